"""Response refinement against real HTTP servers: nothing asked twice, nothing lost, nothing bad let through."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import machine
from tests.data.chat_server import ChatServer, Fault, completion, forward_to, serve
from tests.machine import PATIENCE_SECONDS, wait_for
from ultralong_ray.config import Recipe, RefineConfig
from ultralong_ray.data.refine import refine
from ultralong_ray.data.refine_answers import Answer, AnswerLog, fault_of, make_request
from ultralong_ray.endpoint import EndpointClient
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret-0123456789"
PROMPT = "Q {question} A {response}"


def chat(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"old {number}"}]
    return {"id": f"s/{number}", "domain": ("general", "math")[number % 2], "messages": messages}


def asks(number: int) -> str:
    return f"Q question {number} A old {number}"


def echo(body: dict[str, Any]) -> dict[str, Any]:
    return completion(f"better: {body['messages'][-1]['content']}")


@pytest.fixture
def server() -> Iterator[Any]:
    with serve(echo) as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ChatServer) -> Callable[..., Recipe]:
    """`recipe(samples=50, **refine)`: a recipe that refines that many samples at the server."""
    monkeypatch.setenv("TEST_CHAT_KEY", KEY)

    def make(samples: int = 50, workdir: str = "work", **settings: Any) -> Recipe:
        pq.write_table(pa.Table.from_pylist([chat(i) for i in range(samples)]), tmp_path / "chats.parquet")
        train = {"global_batch_sequences": 1, "learning_rate": 1e-4}
        defaults = {
            "sources": [{"uri": str(tmp_path / "chats.parquet")}],
            "base_url": server.address,
            "api_key_env": "TEST_CHAT_KEY",
            "model": "m",
            "prompt": PROMPT,
            "concurrency": 4,
            "backoff_seconds": 0.02,
            "max_attempts": 4,
            "timeout_seconds": 120,  # a busy machine may be slow to answer; it is then not asked a second time
        }
        window = {"original_context_length": 128, "base_context_length": 128, "target_context_length": 128}
        return Recipe.model_validate(
            {
                "name": "test",
                "workdir": workdir if "://" in workdir else str(tmp_path / workdir),
                "model": {"base": "none", **window},
                "corpus": {"sources": [{"uri": "none"}]},
                "prepare": {"sequence_length": 128, "token_budget": 128},
                "pretrain": train,
                "refine": {**defaults, **settings},
            }
        )

    return make


def samples_of(folder: Any) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for f in (folder / "samples").files() for row in pq.read_table(f.path).to_pylist()}


def aside_of(folder: Any) -> dict[str, tuple[str, str | None]]:
    lines = map(json.loads, (folder / "set_aside.jsonl").read_bytes().decode().splitlines())
    return {line["id"]: (line["reason"], line["answer"]) for line in lines}


def test_every_answer_replaces_the_last_turn_and_is_asked_once(
    server: ChatServer, recipe: Callable[..., Recipe]
) -> None:
    together = threading.Barrier(4)

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if len(server.requests) <= 4:
            together.wait(30)  # the first four are answered only when all of them are there
        return echo(body)

    server.answer = answer
    settings = recipe(usd_per_million_input_tokens=2.0, usd_per_million_output_tokens=8.0)
    stage = refine(settings)
    rows = samples_of(stage.location)
    assert list(rows) == [f"s/{i}" for i in range(50)]
    for i in range(50):
        question, better = rows[f"s/{i}"]["messages"]
        assert question == chat(i)["messages"][0] and better["content"] == f"better: {asks(i)}"
        assert rows[f"s/{i}"]["domain"] == chat(i)["domain"] and rows[f"s/{i}"]["refined"]
    assert server.asked() == {asks(i): 1 for i in range(50)}
    assert server.most_open == 4
    assert server.requests[0]["temperature"] == 0.0 and server.requests[0]["max_completion_tokens"] == 4096
    summary = stage.summary()
    assert (summary["refined"], summary["prompt_tokens"], summary["completion_tokens"]) == (50, 500, 250)
    assert summary["usd"] == pytest.approx((500 * 2 + 250 * 8) / 1e6) and summary["models"] == ["served"]
    refine(settings)
    assert len(server.requests) == 50, "a finished job asks nothing"


def test_conversations_in_another_column(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    chats = [chat(i) for i in range(8)]
    rows = [{"id": c["id"], "domain": c["domain"], "conversations": c["messages"]} for c in chats]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other.parquet")
    source = {"uri": str(tmp_path / "other.parquet"), "text_column": "conversations"}
    refined = samples_of(refine(recipe(sources=[source])).location)
    assert {i: row["messages"][0] for i, row in refined.items()} == {c["id"]: c["messages"][0] for c in chats}


def test_bad_rows_and_shards_as_their_source_asks(
    server: ChatServer, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Too many bad rows and bad shards stop the run before anything is asked, or are left out and reported."""
    mute = {**chat(90), "messages": chat(90)["messages"][:1]}
    half = {**chat(91), "messages": [{"role": "user", "content": "\ud83d"}, chat(91)["messages"][1]]}
    rows = [*map(chat, range(18)), mute, half]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").touch()
    cut = gzip.compress("".join(json.dumps(chat(i)) + "\n" for i in range(30, 40)).encode())[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    files = {"uri": str(tmp_path / "*.jsonl*"), "max_bad_rows_share": 0.1}
    with pytest.raises(
        UserError, match=r"2 bad rows of 20 read, max_bad_rows_share 0\.05 allows 1\. The first: .*no turn of role"
    ):
        refine(recipe(sources=[{"uri": str(tmp_path / "a.jsonl"), "max_bad_rows_share": 0.05}]))
    with pytest.raises(UserError, match=r"empty\.jsonl: the shard is empty"):
        refine(recipe(sources=[files]))
    with pytest.raises(UserError, match=r"hold no sample\. The first that was left out: .*empty\.jsonl"):
        refine(recipe(sources=[{"uri": str(tmp_path / "empty.jsonl"), "on_bad_shard": "skip"}]))
    assert not server.requests
    stage = refine(recipe(sources=[{**files, "on_bad_shard": "skip"}]))
    assert list(samples_of(stage.location)) == [f"s/{i}" for i in range(18)]
    lines = [json.loads(line) for line in (stage.location / "set_aside.jsonl").read_bytes().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [(None, "bad_shard")] * 2 + [(None, "bad_row")] * 2
    assert stage.summary()["set_aside"] == {"bad_row": 2, "bad_shard": 2}


def test_faults_of_the_server_are_tried_again(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    faults = ["cut", "garbage", (429, "{}", {}), (500, "", {}), (503, "busy", {"Retry-After": "0"})]
    failed: dict[str, int] = {}

    def fault(number: int, body: dict[str, Any]) -> Any:
        question = body["messages"][-1]["content"]
        failed[question] = failed.get(question, 0) + 1
        # the first attempt of each question fails, some questions fail twice
        if failed[question] > 1 + (number % 3 == 0 and failed[question] == 2):
            return None
        return faults[int(question.split()[-1]) % len(faults)]

    server.fault = fault
    stage = refine(recipe(30, concurrency=10))
    assert {i: row["messages"][1]["content"] for i, row in samples_of(stage.location).items()} == {
        f"s/{i}": f"better: {asks(i)}" for i in range(30)
    }
    assert server.answered == {asks(i): 1 for i in range(30)}
    assert len(server.requests) >= 60


def test_a_server_that_hangs_is_asked_again(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    server.fault = lambda number, body: "hang" if number < 4 else None
    # where this machine itself takes longer than that to answer, it is asked once more
    stage = refine(recipe(8, timeout_seconds=0.5, max_attempts=40))
    assert len(samples_of(stage.location)) == 8 and len(server.requests) >= 12


def test_retry_after_holds_back_all_requests(
    server: ChatServer, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[EndpointClient] = []
    enter = EndpointClient.__aenter__

    async def noted(client: EndpointClient) -> EndpointClient:
        clients.append(client)
        return await enter(client)

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        # only when the refusal of the first request is known to who sends the next ones
        wait_for(lambda: clients[0]._not_before > 0, 60, "the refusal")
        return echo(body)

    monkeypatch.setattr(EndpointClient, "__aenter__", noted)
    server.answer = answer
    server.fault = lambda number, body: (429, "slow down", {"Retry-After": "0.5"}) if number == 0 else None
    refine(recipe(12, concurrency=4))
    assert all(later - server.times[0] >= 0.5 for later in server.times[4:])
    assert server.answered == {asks(i): 1 for i in range(12)}


def test_retry_after_may_be_a_date_and_may_be_too_far(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    def fault(number: int, body: dict[str, Any]) -> Fault:
        # a date has whole seconds, so this is one second or more from now
        return (503, "", {"Retry-After": formatdate(time.time() + 2, usegmt=True)}) if number == 0 else None

    server.fault = fault
    refine(recipe(6, concurrency=1))
    assert server.times[1] - server.times[0] >= 0.9
    server.fault = lambda number, body: (429, "", {"Retry-After": "86400"})
    with pytest.raises(UserError, match="asks to wait 86400 s"):
        refine(recipe(6, concurrency=1, workdir="other"))


def test_an_interrupted_run_continues_without_asking_again(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    server.fault = lambda number, body: (500, "down", {}) if number >= 20 else None
    settings = recipe(50, max_attempts=2)
    with pytest.raises(UserError, match=r"in a row stayed without an answer.*HTTP 500: down"):
        refine(settings)
    answered = set(server.answered)
    assert len(answered) == 20
    server.fault = lambda number, body: None
    already = len(server.requests)
    stage = refine(settings)
    assert len(server.requests) - already == 30
    assert server.answered == {asks(i): 1 for i in range(50)}
    assert len(samples_of(stage.location)) == 50


def test_kill_9_in_the_middle_loses_only_requests_under_way(
    server: ChatServer, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe(40, concurrency=2)
    file = tmp_path / "recipe.json"
    file.write_text(settings.model_dump_json())
    program = (
        "import sys; from ultralong_ray.config import Recipe; from ultralong_ray.data.refine import refine; "
        "refine(Recipe.model_validate_json(open(sys.argv[1]).read()))"
    )

    def fault(number: int, body: dict[str, Any]) -> None:
        if number == 20:
            os.kill(process.pid, signal.SIGKILL)

    server.fault = fault
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, str(file)], env=environment)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    kept = AnswerLog(Location.of(tmp_path / "work" / "refine-answers")).read()
    assert 17 <= len(kept) <= 21
    server.fault = lambda number, body: None
    refine(settings)
    asked = server.asked()
    assert set(asked) == {asks(i) for i in range(40)}
    assert sum(asked.values()) - 40 <= 3, "only what was under way is asked again"


def test_what_is_no_good_answer_is_set_aside_with_its_reason(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    bad = {
        1: completion("I'm sorry, but I can't help with that."),
        2: completion("The first half of", finish_reason="length"),
        3: completion("", finish_reason="stop"),
        4: completion(None, refusal="I will not."),
        5: completion("x", finish_reason="content_filter"),
        6: {"choices": []},
        7: completion("calls", finish_reason="tool_calls"),
        8: completion("no usage", usage=None),
    }

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return bad.get(int(body["messages"][-1]["content"].split()[-1]), echo(body))

    server.answer = answer
    server.fault = lambda number, body: (400, "too long", {}) if body["messages"][-1]["content"] == asks(9) else None
    settings = recipe(12)
    stage = refine(settings)
    assert {i: reason for i, (reason, _) in aside_of(stage.location).items()} == {
        "s/1": "refused",
        "s/2": "truncated",
        "s/3": "malformed",
        "s/4": "refused",
        "s/5": "refused",
        "s/6": "malformed",
        "s/7": "malformed",
        "s/9": "rejected",
    }
    assert aside_of(stage.location)["s/2"][1] == "The first half of"
    assert sorted(samples_of(stage.location)) == ["s/0", "s/10", "s/11", "s/8"]
    summary = stage.summary()
    assert summary["set_aside"] == {"malformed": 3, "refused": 3, "rejected": 1, "truncated": 1}
    assert summary["answers_without_usage"] == 3
    # Another rule for what counts as good needs no new answers.
    already = len(server.requests)
    stage = refine(recipe(12, refusals=[], keep_original=True))
    assert len(server.requests) == already
    rows = samples_of(stage.location)
    assert len(rows) == 12 and rows["s/1"]["refined"] and not rows["s/2"]["refined"]
    assert rows["s/2"]["messages"] == chat(2)["messages"]


def test_a_budget_stops_cleanly_and_counts_earlier_answers(server: ChatServer, recipe: Callable[..., Recipe]) -> None:
    prices = {"usd_per_million_input_tokens": 100.0, "usd_per_million_output_tokens": 0.0}  # 0.001 USD an answer
    with pytest.raises(UserError, match=r"budget_usd 0\.01: spent 0\.01"):
        refine(recipe(budget_usd=0.01, **prices))
    assert 10 <= len(server.requests) <= 13  # those under way are finished and kept
    first = len(server.requests)
    with pytest.raises(UserError, match="earlier"):
        refine(recipe(budget_usd=0.01, **prices))
    assert len(server.requests) == first
    refine(recipe(budget_usd=1.0, **prices))
    assert server.answered == {asks(i): 1 for i in range(50)}


def test_the_key_is_sent_and_written_nowhere(
    server: ChatServer, recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server.fault = lambda number, body: (400, f"the key {KEY} is odd", {}) if number % 2 else (500, f"{KEY}!", {})
    refine(recipe(8, max_attempts=40, backoff_seconds=0.001))
    assert server.authorization == {f"Bearer {KEY}"}
    server.fault = lambda number, body: (401, f"Incorrect API key provided: {KEY}", {})
    with pytest.raises(UserError, match="environment variable TEST_CHAT_KEY") as error:
        refine(recipe(8, temperature=0.5))
    written = [file.read_bytes() for file in (tmp_path / "work").rglob("*") if file.is_file()]
    assert len(written) > 4 and any(b"the key *** is odd" in content for content in written)
    assert not any(KEY.encode() in content for content in written)
    assert KEY not in str(error.value) and KEY not in caplog.text


def test_what_no_request_can_mend_stops_at_once(
    server: ChatServer, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(fault: Any, **settings: Any) -> str:
        server.requests.clear()
        server.fault = lambda number, body: fault
        with pytest.raises(UserError) as error:
            refine(recipe(60, **settings))
        return str(error.value)

    assert "quota of this key is used up" in message((429, '{"error": {"code": "insufficient_quota"}}', {}))
    assert len(server.requests) <= 4
    assert "Check refine.base_url and refine.model 'm'" in message((404, "no such model", {}))
    assert "first 20 requests were all refused, the last one with HTTP 422: odd" in message((422, "odd", {}))
    assert len(server.requests) <= 24
    monkeypatch.delenv("TEST_CHAT_KEY")
    assert "variable TEST_CHAT_KEY is not set" in message(None, workdir="other")


def test_equal_requests_are_asked_once_and_num_samples_limits(
    server: ChatServer, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe(10, num_samples=4)
    stage = refine(settings)
    assert len(server.requests) == len(samples_of(stage.location)) == 4
    rows = [{**chat(1), "id": f"copy/{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "copies.parquet")
    stage = refine(recipe(sources=[{"uri": str(tmp_path / "copies.parquet")}], temperature=0.5))
    assert len(server.requests) == 5 and len(samples_of(stage.location)) == 5


def test_answers_in_object_storage(server: ChatServer, recipe: Callable[..., Recipe], s3_uri: str) -> None:
    server.fault = lambda number, body: (500, "down", {}) if number >= 30 else None
    settings = recipe(50, workdir=f"{s3_uri}/refine", max_attempts=1)
    with pytest.raises(UserError, match="stayed without an answer"):
        refine(settings)
    server.fault = lambda number, body: None
    stage = refine(settings)
    assert server.answered == {asks(i): 1 for i in range(50)}
    with (stage.location / "samples" / "part-00000.parquet").filesystem.open_input_file(
        (stage.location / "samples" / "part-00000.parquet").path
    ) as file:
        assert pq.read_table(file).num_rows == 50


def test_requests_of_several_turns_and_odd_texts() -> None:
    config = RefineConfig(sources=({"uri": "x"},), model="m", system="Be brief.", prompt=PROMPT, temperature=None)  # type: ignore[arg-type]
    messages = [
        {"role": "system", "content": "You teach."},
        {"role": "user", "content": "{response} \\1 {x}"},
        {"role": "assistant", "content": "old {question}"},
        {"role": "user", "content": "thanks"},
    ]
    request = make_request(messages, config)
    assert request.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q System: You teach.\n\nUser: {response} \\1 {x} A old {question}"},
    ]
    assert "temperature" not in request.body
    assert request.key == make_request(messages, config.model_copy(update={"concurrency": 99})).key
    assert request.key != make_request(messages, config.model_copy(update={"request_fields": {"seed": 1}})).key


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("I\u2019m sorry, but I can\u2019t assist with that request.", "refused"),
        ("As an AI language model, I cannot have opinions.", "refused"),
        ("I cannot fulfil this.", "refused"),
        ("I can provide two proofs.", None),
        ("The clerk said: I'm sorry, but I can't help.", None),
    ],
)
def test_refusals(content: str, reason: str | None) -> None:
    config = RefineConfig(sources=({"uri": "x"},), model="m")  # type: ignore[arg-type]
    fault = fault_of(Answer("k", content, "stop"), config)
    assert (fault and fault[0]) == reason


def test_a_torn_line_of_the_log_is_passed_over(tmp_path: Path) -> None:
    log = AnswerLog(Location.of(tmp_path))
    log.append(Answer("a", "one\n\u2028 line", "stop"))
    log.append(Answer("b", "two", "stop"))
    log.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert AnswerLog(Location.of(tmp_path)).read() == {"a": Answer("a", "one\n\u2028 line", "stop")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "rewrite {response}"}, r"no \{question\}"),
        ({"base_url": "https://me:secret@host/v1"}, "must not carry a user name"),
        ({"base_url": "host/v1"}, "is no address"),
        ({"budget_usd": 5.0}, r"needs refine\.usd_per_million"),
        ({"refusals": ["("]}, "is no regular expression"),
        ({"sources": [{"uri": "x", "input_ids_column": "ids"}]}, "input_ids_column 'ids' is for documents"),
    ],
)
def test_settings_that_are_refused(recipe: Callable[..., Recipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.fixture(scope="module")
def transformers_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with machine.transformers_server(tiny_llama, tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


def test_against_transformers_serve_interrupted_half_way(
    transformers_server: str, tiny_llama: Path, server: ChatServer, recipe: Callable[..., Recipe]
) -> None:
    """A real model behind the counting server: half of the answers, an outage, the rest; then training data."""
    server.answer = forward_to(transformers_server)
    server.fault = lambda number, body: "cut" if number >= 5 else None
    settings = recipe(10, model=str(tiny_llama), max_completion_tokens=4, concurrency=2, max_attempts=2)
    with pytest.raises(UserError, match="stayed without an answer"):
        refine(settings)
    assert len(server.answered) == 5
    server.fault = lambda number, body: None
    stage = refine(settings)
    assert server.answered == {asks(i): 1 for i in range(10)}
    summary = stage.summary()
    # a random model does not end its turn within 4 tokens
    assert summary["answers"] == 10 and summary["answers_without_usage"] == 0 and summary["prompt_tokens"] > 100
    assert summary["refined"] + sum(summary["set_aside"].values()) == 10
    assert {reason for reason, _ in aside_of(stage.location).values()} <= {"truncated", "malformed"}


def test_the_job_prints_where_the_result_is(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe(6).model_dump(mode="json", exclude_none=True)
    file = tmp_path / "recipe.toml"
    file.write_text(_toml(settings))
    assert tomllib.loads(file.read_text())["refine"]["model"] == "m"
    command = [sys.executable, str(ROOT / "jobs" / "refine.py"), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "refined 6 samples" in done.stdout and "[[sft.sources]]" in done.stdout
    environment["TEST_CHAT_KEY"] = ""
    command += ["--refine.temperature", "1.0"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert again.returncode == 2 and "TEST_CHAT_KEY is not set" in again.stderr


def _toml(value: dict[str, Any]) -> str:
    """Inline TOML: JSON is TOML but for the colons of objects."""

    def inline(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(inline, item)) + "]"
        return json.dumps(item)

    return "\n".join(f"{name} = {inline(item)}" for name, item in value.items()) + "\n"
