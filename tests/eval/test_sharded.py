"""The sharded engine against the in-process one: the same answers and logits, whoever holds the keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parallel.spawn import run_distributed
from ultralong_ray.eval import partial_attention
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.partial_attention import attend_slice, decode_kernel, merge
from ultralong_ray.eval.passkey import build_prompt
from ultralong_ray.eval.sharded import GROUP_TIMEOUT, ShardedEngine, ShardedModel
from ultralong_ray.eval.sharded_attention import SHARDED_ATTENTION, register_sharded_attention
from ultralong_ray.parallel.kernels import math
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.types import UserError

MODEL = Path(__file__).resolve().parents[2] / "jobs" / "models" / "tiny-512"
CPU = torch.device("cpu")
NEW_TOKENS = 6
CHUNK = 200  # beyond the shortest prompts, no multiple of any degree's unit
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FEWER = 5  # the further layouts of a world are asked every 5th prompt: four processes share two cores here
SEQ = 41  # odd: padded for every degree


def prompts(tokenizer: Any) -> list[list[int]]:
    """50 passkey prompts of 110 to 474 tokens; neighbours share their beginning."""
    cells = [(length, depth) for length in (150, 210, 290, 380, 480) for depth in (0, 20, 50, 80, 100)]
    return [
        build_prompt(
            tokenizer,
            context_length_tokens=length,
            depth_percent=depth,
            sample=sample,
            seed=3,
            max_new_tokens=NEW_TOKENS,
            chat_template=True,
        ).ids
        for length, depth in cells
        for sample in range(2)
    ]


@pytest.fixture(scope="module")
def expected() -> tuple[list[str], np.ndarray]:
    """Answers and logits [50, vocab] of the in-process engine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a core in turns are slower than one
    engine = Engine(MODEL, precision="float32", prefill_chunk_tokens=64, device="cpu")
    asked = prompts(engine.tokenizer)
    logits = np.stack([engine.prefill(ids).numpy() for ids in asked])
    answers = [engine.answer(ids, NEW_TOKENS) for ids in asked]
    torch.set_num_threads(threads)
    return answers, logits


def ask_all(ulysses: int, every: int) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    engine = ShardedEngine(
        MODEL, precision="float32", prefill_chunk_tokens=CHUNK, ulysses_degree=ulysses, device=CPU, attention="auto"
    )
    asked = prompts(engine.tokenizer)[::every]
    logits, answers = [], []
    for ids in asked:
        logits.append(engine.prefill(ids).numpy())
        answers.append(engine.answer(ids, NEW_TOKENS))
    engine.model.forget()
    engine.answer(asked[-1], NEW_TOKENS)
    cache = engine.model.cache
    held = {"tokens": len(asked[-1]), "positions": cache.positions.tolist(), "bytes": cache.num_bytes}
    group: Any = engine.model._mesh.ulysses or engine.model._mesh.ring
    held["timeout"] = group._get_backend(CPU).options._timeout
    return answers, np.stack(logits), held


@pytest.mark.parametrize(("world", "index"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2)])
def test_answers_are_those_of_the_in_process_engine(world: int, index: int, expected: Any, solved: Any) -> None:
    by_rank = [rank[0][index] for rank in solved(world)]
    answers, logits = (found[:: 1 if index == 0 else FEWER] for found in expected)
    said = sum(answer.strip().isdigit() for answer in answers)
    assert said > 0.6 * len(answers), "the model must have something to say"
    for found, found_logits, _ in by_rank:
        assert found == answers
        np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-4)
    held = [rank[2] for rank in by_rank]
    assert {rank["timeout"] for rank in held} == {GROUP_TIMEOUT}, "a long prompt is queued as a whole"
    positions = sorted(position for rank in held for position in rank["positions"])
    tokens = held[0]["tokens"]
    assert positions == list(range(len(positions))), "every token is held by one rank"
    assert tokens < len(positions) < tokens + NEW_TOKENS
    a_token = 2 * 4 * 2 * 64 * 4  # key and value, layers, key-value heads, head_dim, float32
    room = tokens + -(-NEW_TOKENS // world) * world
    assert sum(rank["bytes"] for rank in held) == room * a_token


def tiny(family: str, attention: str, seed: int = 7, **changes: Any) -> Any:
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 1, "initializer_range": 0.3, "sliding_window": None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(values | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def ids_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, SEQ)


def sharded(family: str, ulysses: int, chunk: int, **changes: Any) -> ShardedModel:
    register_sharded_attention()
    return ShardedModel(
        tiny(family, SHARDED_ATTENTION, **changes),
        ulysses_degree=ulysses,
        prefill_chunk_tokens=chunk,
        mlp_tile_tokens=4,
    )


def families(layouts: list[tuple[int, int]]) -> list[tuple[str, float, float, bool]]:
    """(what, error of logits, error of losses, was a shared beginning reused with the same bits) of every case."""
    partial_attention.SPLIT_ROWS = 4
    found = []
    for family in FAMILIES:
        plain = tiny(family, "eager")
        first, second = ids_of(1), ids_of(2)
        second[:25] = first[:25]
        with torch.inference_mode():
            whole = plain(torch.from_numpy(second)[None]).logits[0]  # [SEQ, vocab]
        targets = torch.from_numpy(second[1:])
        losses = torch.nn.functional.cross_entropy(whole[:-1], targets, reduction="none").numpy()
        for ulysses, chunk in layouts:
            ours = sharded(family, ulysses, chunk)
            ours.prefill(first)
            ours.decode(3)
            rows = [ours.prefill(second[:30])] + [ours.decode(int(token)) for token in second[30:]]
            fresh = sharded(family, ulysses, chunk)
            same = torch.equal(rows[0], fresh.prefill(second[:30]))
            error = float((torch.stack(rows) - whole[29:]).abs().max())
            loss_error = float(np.abs(ours.token_losses(second.astype(np.int32)) - losses).max())
            found.append((f"{family} {ulysses} {chunk}", error, loss_error, same))
    return found


def refusals() -> list[str]:
    said = []
    for family, ulysses, changes in (
        ("llama", 3, {}),
        ("llama", 4, {"num_attention_heads": 6, "hidden_size": 48}),
        ("mistral", 1, {"sliding_window": 16}),
        ("llama", 1, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}),
    ):
        with pytest.raises(UserError) as caught:
            sharded(family, ulysses, 16, **changes).prefill(ids_of(1))
        said.append(str(caught.value))
    return said


# World size -> Ulysses degrees of the fifty prompts; Ulysses degree and chunk tokens of the model families.
WORLDS: dict[int, tuple[list[int], list[tuple[int, int]]]] = {
    2: ([2, 1], [(2, 1), (1, 7)]),
    4: ([2, 4, 1], [(4, 1000), (2, 10), (1, 13)]),
}


def everything(world: int) -> tuple[list[Any], list[tuple[str, float, float, bool]], list[str]]:
    degrees, layouts = WORLDS[world]
    answers = [ask_all(ulysses, 1 if place == 0 else FEWER) for place, ulysses in enumerate(degrees)]
    return answers, families(layouts), refusals() if world == 4 else []


@pytest.fixture(scope="module")
def solved() -> Callable[[int], list[Any]]:
    """What every rank of a world found; each world is started once."""
    return functools.cache(lambda world: run_distributed(everything, world, world))


@pytest.mark.parametrize("world", [2, 4])
def test_model_families_layouts_chunks_and_reuse(world: int, solved: Any) -> None:
    layouts = WORLDS[world][1]
    for _, found, said in solved(world):
        assert len(found) == len(FAMILIES) * len(layouts)
        for what, error, loss_error, same in found:
            assert error < 1e-4 and loss_error < 1e-4, what
            assert same, f"{what}: a shared beginning changes nothing"
        if world == 4:
            assert "ulysses_degree 3 cannot split 4 ranks" in said[0]
            assert "6 query heads" in said[1] and "sliding_window 16" in said[2]
            assert "rope_type is 'dynamic'" in said[3] and "kind in_process" in said[3]


@pytest.mark.parametrize("rows", [1, 7, 8, 19])
def test_a_slice_in_stretches_is_the_slice(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_attention, "SPLIT_ROWS", 4)
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(6, 8, generator=generator)
    keys, values = torch.randn(2, 1, rows, 2, 8, generator=generator)
    output, lse = attend_slice(query, keys, values, 0.4, math.load())
    for head in range(6):
        scores = keys[0, :, head // 3] @ query[head] * 0.4  # [rows]
        torch.testing.assert_close(lse[head], scores.logsumexp(0))
        torch.testing.assert_close(output[head], scores.softmax(0) @ values[0, :, head // 3])


def test_cudnn_serves_prompts_only() -> None:
    assert decode_kernel(Kernel("cudnn", math.forward, math.backward)).name == "sdpa_flash"
    assert decode_kernel(math.load()).name == "math"


def test_parts_without_keys_count_for_nothing() -> None:
    no_keys = torch.empty(1, 0, 2, 8)
    empty, empty_lse = attend_slice(torch.ones(4, 8), no_keys, no_keys, 1.0, math.load())
    part, lse = torch.randn(4, 8), torch.tensor([-300.0, 0.0, 5.0, 300.0])
    merged, total = merge([empty, part, empty], torch.stack([empty_lse, lse, empty_lse]))
    assert torch.equal(merged, part) and torch.equal(total, lse)
