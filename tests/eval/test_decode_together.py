"""Answers decoded together: the same as one by one, in fewer forwards, each ending where it ends alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import InProcessEngine
from ultralong_ray.eval.decode_together import grouped
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.open_engine import open_engine


def engine(folder: Path, batch_tokens: int, attention: Any = None) -> Engine:
    places: dict[str, Any] = {"precision": "float32", "prefill_chunk_tokens": 50, "device": "cpu"}
    return Engine(folder, **places, attention=attention, batch_tokens=batch_tokens)


def requests(engine: Engine, lengths: tuple[int, ...], new_tokens: tuple[int, ...]) -> list[Request]:
    """Prompts of random ids; the third begins as the second does, so that its beginning is not read again."""
    generator = torch.Generator().manual_seed(3)
    found: list[Request] = []
    for number, (length, new) in enumerate(zip(lengths, new_tokens, strict=True)):
        ids = torch.randint(10, 300, (length,), generator=generator).tolist()
        if number == 2:
            ids[:60] = found[1].ids[:60]
        found.append(Request("", ids, new))
    return found


LENGTHS, NEW_TOKENS = (30, 192, 120, 5), (12, 20, 20, 1)


@pytest.mark.parametrize("attention", ["sdpa", "ultralong_chunk"])
def test_answers_are_those_of_one_at_a_time(tiny_llama: Path, attention: str) -> None:
    alone, together = engine(tiny_llama, 1, attention), engine(tiny_llama, 10_000, attention)
    asked = requests(alone, LENGTHS, NEW_TOKENS)
    expected = alone.answers(asked)
    assert len(set(expected)) == 4, "answers that could be mixed up"
    usual = together.model.config._attn_implementation
    assert together.answers(asked) == expected
    assert together.answers(reversed(asked)) == expected[::-1]
    assert together.model.config._attn_implementation == usual == attention


def test_an_answer_ends_where_it_ends_alone(tiny_llama: Path) -> None:
    """At a stop text of its own, or before an end-of-text token, while others go on."""
    alone, together = engine(tiny_llama, 1), engine(tiny_llama, 10_000)
    asked = requests(alone, LENGTHS, (20, 20, 20, 20))
    whole = alone.answers(asked)
    first = Request("", asked[0].ids, 20, stop=(whole[0][3:6],))
    decoded: list[int] = []
    hook = alone.model.register_forward_pre_hook(lambda module, args: decoded.extend(args[0][0].tolist()))
    alone.answers(asked[1:2])
    hook.remove()
    ends = decoded[-10]
    for each in (alone, together):
        each.stop_ids = {ends}
    expected = alone.answers([first, *asked[1:]])
    assert expected[0] != whole[0] and expected[1] != whole[1]
    assert together.answers([first, *asked[1:]]) == expected


def test_one_forward_decodes_all_that_go_on(tiny_llama: Path) -> None:
    ours = engine(tiny_llama, 10_000)
    ours.stop_ids = set()
    rows: list[tuple[int, ...]] = []
    ours.model.register_forward_pre_hook(lambda module, args: rows.append(tuple(args[0].shape)))
    ours.answers(requests(ours, (30, 70, 65), (2, 5, 4)))
    assert rows == [(1, 30), (1, 50), (1, 20), (1, 15), (3, 1), (2, 1), (2, 1), (1, 1)]


def test_groups_hold_no_more_tokens_than_asked() -> None:
    asked = [Request("", [1] * length, 10) for length in (40, 40, 90, 100, 5, 5, 80)]
    assert [[len(each.ids) for each in group] for group in grouped(asked, lambda: 100)] == [
        [40, 40],
        [90],
        [100],
        [5, 5],
        [80],
    ]
    assert [len(group) for group in grouped(asked, lambda: 1)] == [1] * 7
    assert list(grouped([], lambda: 100)) == []


def test_a_request_is_made_when_its_group_is_filled(tiny_llama: Path) -> None:
    """A later prompt may be a million tokens, and is not made while others are asked."""
    ours = engine(tiny_llama, 100)
    made: list[int] = []
    seen: list[int] = []
    ours.model.register_forward_pre_hook(lambda module, args: seen.append(len(made)))

    def taken() -> Any:
        for number in range(4):
            made.append(number)
            yield Request("", [10 + number] * 40, 3)

    ours.answers(taken())
    assert seen[0] == 3 and seen[-1] == 4, "the first of the next group is there when a group is full, and no more"


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 64},
        {"attention_chunk_size": 64},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
    ],
)
def test_models_that_cannot_decode_together_answer_one_at_a_time(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from ultralong_ray.eval import generate

    read = generate.AutoConfig.from_pretrained

    def changed(*args: Any, **named: Any) -> Any:
        config = read(*args, **named)
        for name, value in change.items():
            setattr(config, name, value)
        return config

    assert engine(tiny_llama, 10_000).batch_tokens == 10_000
    monkeypatch.setattr(generate.AutoConfig, "from_pretrained", changed)
    assert engine(tiny_llama, 10_000).batch_tokens == 1


def test_what_does_not_fit_into_memory_together_is_answered_by_fewer(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer is lost by it, and later groups are smaller at once."""
    from ultralong_ray.eval import generate

    sizes: list[int] = []
    decode = generate.next_logits

    def of_two(model: Any, held: Any, *rest: Any) -> Any:
        sizes.append(len(held))
        if len(held) > 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return decode(model, held, *rest)

    monkeypatch.setattr(generate, "next_logits", of_two)
    ours, alone = engine(tiny_llama, 230), engine(tiny_llama, 1)
    asked = [Request("", [10 + number] * 50, 6) for number in range(7)]
    assert ours.answers(asked) == alone.answers(asked)
    assert sizes[0] == 4 and set(sizes[1:]) == {2} and ours.batch_tokens == 112
    assert "4 prompts of 224 tokens in all do not fit into memory of cpu together" in caplog.text
    assert "evaluate.engine.batch_tokens is 112 from here on" in caplog.text
    assert ours.model.config._attn_implementation == "sdpa"


def test_a_prompt_half_read_when_memory_ran_out_is_read_again(tiny_llama: Path) -> None:
    ours, alone = engine(tiny_llama, 10_000), engine(tiny_llama, 1)
    first, other = requests(alone, (120, 150), (6, 6))
    asked = [first, other, first]
    chunks: list[int] = []

    def fails_once(module: Any, args: Any) -> None:
        chunks.append(args[0].shape[1])
        if len(chunks) == 7:  # the first prompt again, of which nothing is held any more
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    ours.model.register_forward_pre_hook(fails_once)
    assert ours.answers(asked) == alone.answers(asked)
    assert chunks[:10] == [50, 50, 20, 50, 50, 50, 50, 50, 50, 20]


def test_the_recipe_says_how_many_tokens(tiny_llama: Path) -> None:
    config = EvaluateConfig(engine=InProcessEngine(batch_tokens=777))
    opened: Any = open_engine(config, "final", tiny_llama)
    assert opened.batch_tokens == 777
    assert "batch_tokens" not in config.fingerprint_fields()["engine"]
