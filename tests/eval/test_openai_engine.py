"""The endpoint engine: a real server with the same weights gives the in-process answers; faults get clear messages."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.served import Served, serve
from tests.machine import transformers_server
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import EndpointEngine
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.openai_engine import OpenAIEngine
from ultralong_ray.eval.passkey import build_prompt
from ultralong_ray.types import UserError

MODEL = Path(__file__).resolve().parents[2] / "jobs" / "models" / "tiny-512"
KEY = "sk-very-secret-0123456789"


def engine(address: str, **changes: Any) -> OpenAIEngine:
    values = {"kind": "openai", "base_url": address, "served": {"final": "m"}, "backoff_seconds": 0.01}
    values |= {"timeout_seconds": 60, "max_attempts": 3, "concurrency": 2}
    return OpenAIEngine(MODEL, EndpointEngine.model_validate(values | changes), "final")


def request(text: str = "one two", **changes: Any) -> Request:
    return Request(**{"text": text, "ids": [5, 6, 7], "max_new_tokens": 4, "stop": ("\n",), **changes})


@pytest.fixture
def server() -> Iterator[Served]:
    with serve() as running:
        yield running


def test_answers_come_in_order_and_few_at_a_time(server: Served) -> None:
    made: list[int] = []
    begun, overtaken = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> str:
        number = body["prompt"][0]
        if number == 0:
            begun.set()
            assert overtaken.wait(60), "the first is answered after the one behind it"
        elif number == 1:
            assert begun.wait(60), "both are under way at a time"
            overtaken.set()
        return f" {number}\nmore"

    server.reply = reply

    def requests() -> Iterator[Request]:
        for number in range(12):
            made.append(number)
            assert len(made) - len(server.bodies) <= 3, "a prompt is made when there is room for it"
            yield request(ids=[number, 1, 2])

    ours = engine(server.address)
    assert ours.answers(requests()) == [str(number) for number in range(12)]
    assert server.most_open == 2
    assert ours.finish_reasons == ["stop"] * 12
    body = server.bodies[0]
    assert body["temperature"] == 0.0 and body["max_tokens"] == 4 and "stop" not in body


def test_a_chat_carries_messages_and_the_beginning_of_the_answer(server: Served) -> None:
    chat = request(messages=(("user", "Hello"),), answer_prefix="The key is")
    assert engine(server.address, api="chat").answers([chat]) == ["ok"]
    body = server.bodies[-1]
    assert body["messages"] == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The key is"}]
    assert body["continue_final_message"] and not body["add_generation_prompt"] and body["max_tokens"] == 4
    engine(server.address, api="chat", continue_answer=False).answers([chat])
    assert [message["role"] for message in server.bodies[-1]["messages"]] == ["user"]
    with pytest.raises(UserError, match="this prompt is no chat"):
        engine(server.address, api="chat").answers([request()])


def test_a_server_gets_no_more_stop_texts_than_the_protocol_allows(server: Served) -> None:
    """HumanEval has five; the answer ends at the fifth all the same."""
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    server.reply = lambda body: "    return 1\nprint(2)"
    assert engine(server.address).answers([request(stop=stop, exact=True)]) == ["    return 1"]
    assert server.bodies[-1]["stop"] == list(stop[:4])


def test_faults_that_pass_are_tried_again(server: Served) -> None:
    faults = iter([(429, "slow down"), (500, "oops"), "cut", "garbage"])
    server.fault = lambda: next(faults, None)
    ours = engine(server.address, max_attempts=5, concurrency=1)
    assert ours.answers([request(), request()]) == ["ok", "ok"]
    assert len(server.bodies) == 6


def test_a_server_that_hangs_is_asked_again(server: Served) -> None:
    faults = iter(["hang"])
    server.fault = lambda: next(faults, None)
    # where this machine itself takes longer than that to answer, it is asked once more
    ours = engine(server.address, max_attempts=20, timeout_seconds=0.5)
    assert ours.answers([request()]) == ["ok"] and len(server.bodies) >= 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((429, "slow down"), r"no answer to one of its requests: HTTP 429: slow down \(3 attempts\)"),
        ((500, f"{KEY} is down"), r"HTTP 500: \*\*\* is down .* submit again: stored cells are kept"),
        ("hang", r"no answer within evaluate.engine.timeout_seconds 0.3"),
        ("garbage", r"no answer to one of its requests: no completion"),
        ((401, "who are you"), r"HTTP 401 .*Check the key in the environment variable TEST_KEY"),
        ((500, "x" * 290 + KEY), r"HTTP 500: x{290}\*\*\* \(3 attempts\)"),
        ((200, "[" * 200_000), r"no answer to one of its requests: .*recursion.*: \[\["),
        (
            (200, '{"choices": [{"text": ""}], "error": "lost it"}'),
            r"no completion \(an error stands beside it\).*lost it",
        ),
        ((200, '{"choices": [{"text": "a", "error": {"code": 502}}]}'), r"an error stands beside it.*502"),
        ((404, "no such model"), r"Check evaluate.engine.base_url and evaluate.engine.served 'm'"),
        ((400, "maximum context length is 2"), r"refused a prompt of 3 tokens \(HTTP 400: maximum context length"),
    ],
)
def test_faults_that_stay_are_named(server: Served, monkeypatch: Any, fault: Any, message: str, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEST_KEY", KEY)
    server.fault = lambda: fault
    with pytest.raises(UserError, match=message) as error:
        patience = 0.3 if fault == "hang" else 60
        engine(server.address, timeout_seconds=patience, api_key_env="TEST_KEY").answers([request()])
    assert KEY[:10] not in str(error.value) and KEY[:10] not in caplog.text
    assert server.keys == {f"Bearer {KEY}"}


def test_a_window_too_small_is_refused_before_anything_is_sent(server: Served) -> None:
    server.window = 6
    with pytest.raises(UserError, match=r"'m' reads 6 tokens at most, and this prompt has 3 with 4 to come.*len 7"):
        engine(server.address).answers([request()])
    assert server.bodies == []
    assert engine(server.address).answers([request(max_new_tokens=3)]) == ["ok"]
    with pytest.raises(UserError, match="reads 5 tokens at most"):
        engine(server.address, max_context_tokens=5).answers([request(max_new_tokens=3)])


def test_a_prompt_that_the_server_cut_is_noticed(server: Served) -> None:
    server.prompt_tokens = 2
    with pytest.raises(UserError, match="read 2 tokens of a prompt that has 3 here: its tokenizer"):
        engine(server.address).answers([request()])
    server.prompt_tokens = 1
    with pytest.raises(UserError, match="read 1 tokens of a prompt that has 3 here: it dropped"):
        engine(server.address).answers([request()])


def test_answers_that_are_cut_or_empty_are_kept_with_their_reason(server: Served, caplog: Any) -> None:
    replies = iter(["", None, "abc"])
    server.reply = lambda body: next(replies)
    server.finish_reason, server.completion_tokens = "length", 2
    ours = engine(server.address, concurrency=1)
    assert ours.answers([request(), request(), request()]) == ["", "", "abc"]
    assert ours.finish_reasons == ["length, after 2 of 4 tokens"] * 3
    assert "cut an answer after 2 of 4 tokens" in caplog.text


def test_half_a_character_in_an_answer_can_be_written_into_a_file(server: Served) -> None:
    server.reply = lambda body: "\ud83d\ude00 and \ud83d"
    (answer,) = engine(server.address).answers([request()])
    assert answer == "\N{GRINNING FACE} and \N{REPLACEMENT CHARACTER}"


def test_a_charset_that_is_no_text_encoding_does_not_matter(server: Served) -> None:
    server.content_type = "application/json; charset=base64"
    assert engine(server.address).answers([request()]) == ["ok"]


def test_a_server_that_is_not_there_is_told_at_once(server: Served) -> None:
    engine(server.address).check()
    engine(f"{server.address}/wrong").check()  # a server need not have a list of models
    with socket.socket() as closed:  # bound, so that nobody else is there, but it does not listen
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"/models: Client.*Cannot connect .*\(3 attempts\)\. Start the server"):
            engine(address).check()


def test_settings_that_are_refused() -> None:
    base = {"kind": "openai", "served": {"final": "m"}}
    for changes, message in (
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "http://me:secret@host/v1"}, "must not carry a user name"),
        ({"served": {"base": "m"}}, "does not say what the server calls 'final'"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateConfig.model_validate({"models": ["final"], "engine": base | changes, "context_lengths": [64]})


def test_fifty_answers_of_a_served_model_are_those_of_the_in_process_engine(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = Engine(MODEL, precision="float32", prefill_chunk_tokens=64, device="cpu")
    cells = [(length, depth) for length in (150, 210, 290, 380, 480) for depth in (0, 20, 50, 80, 100)]
    requests = []
    for length, depth in cells:
        for sample in range(2):
            values = {"context_length_tokens": length, "depth_percent": depth, "sample": sample, "seed": 3}
            made = build_prompt(plain.tokenizer, max_new_tokens=6, chat_template=True, **values)
            turns = {"messages": (("user", made.message),), "answer_prefix": made.answer_prefix}
            requests.append(Request(made.prompt, made.ids, 6, ("\n",), **turns))
    expected = plain.answers(requests)
    torch.set_num_threads(threads)
    assert sum(answer.strip().isdigit() for answer in expected) > 30, "the model must have something to say"
    chats = []
    for each in requests[:2]:
        text = each.text.removesuffix(each.answer_prefix)
        ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
        chats.append(Request(text, ids, 6, ("\n",), messages=each.messages))
    with transformers_server(MODEL, tmp_path / "log") as address:
        served = {"served": {"final": str(MODEL)}, "concurrency": 1}
        assert engine(address, prompt_as="text", **served).answers(requests) == expected
        assert engine(address, api="chat", **served).answers(chats) == plain.answers(chats)
