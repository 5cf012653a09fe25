"""Loss, every gradient and the gradient norm at any degree, ZeRO stage and batching are those of one process."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.numerics import BREAKAGES, STARTS, Answer, Case, Models, problem, reference, solve
from tests.parallel.spawn import run_distributed, write_model, write_packed
from ultralong_ray.storage import Location
from ultralong_ray.types import LayerKeep

RELATIVE = 1e-5  # float32 sums in another order; seen: below 2e-6
# A parameter difference after a step of rate 1 has lost the bits below the parameter's own last one.
RELATIVE_BY_STEP = 1e-5

# Two sequences per step: micro_batch_sequences 1, the default, makes them two passes at degree 2.
TWO_RANKS = [
    Case("zero3 accumulation", 2),
    Case("zero3 one kv head", 2, kv_heads=1),
    Case("zero3 two at once", 2, changes={"micro_batch_sequences": 2}),
    Case("zero3 tied", 2, tied=True),
    Case("zero3 masked", 2, changes={"mask_documents": True, "micro_batch_sequences": 2}),
    Case("zero3 data parallel", 1),
    Case("zero2 accumulation", 2, changes={"zero_stage": 2}),
    Case("zero1 clipped", 2, changes={"zero_stage": 1, "gradient_clip": 0.25}),
    Case("zero0 clipped", 2, changes={"zero_stage": 0, "gradient_clip": 0.25}),
    Case("zero3 clipped", 2, changes={"gradient_clip": 0.25}),
    Case("zero1 tied", 2, tied=True, changes={"zero_stage": 1}),
    Case("ring two at once", 1, 2, changes={"micro_batch_sequences": 2}),
]
RING_ONLY = "positions as if the rank held one run"  # a Ulysses rank does hold one
BROKEN = [
    Case("broken", *degrees, changes={"zero_stage": 1, "micro_batch_sequences": 2}, broken=breakage)
    for breakage in (*BREAKAGES, "mean per rank")
    for degrees in [(1, 2) if breakage == RING_ONLY else (2, 1)]
]
FOUR_RANKS = [
    Case("zero3", 4),
    Case("zero3 one kv head masked", 4, kv_heads=1, changes={"mask_documents": True, "micro_batch_sequences": 2}),
    Case("zero3 two groups", 1, 2, kv_heads=4),
    Case("zero1", 4, changes={"zero_stage": 1}),
    Case("no recomputation", 4, kv_heads=4, changes={"gradient_checkpointing": False}),
    Case("2x2 two at once, one kv head", 2, 2, kv_heads=1, changes={"micro_batch_sequences": 2}),
    Case("1x4 two at once", 1, 4, changes={"micro_batch_sequences": 2}),
    Case("1x4, more ranks than heads", 1, 4, heads=1, kv_heads=1),
]
HALF_ON_HOST = LayerKeep("host", "host", 0.5)
EIGHT_RANKS = [
    Case("8x1, one kv head each, half on the host", 8, heads=16, kv_heads=8, keep=HALF_ON_HOST),
    Case("4x2, half on the host", 4, 2, heads=8, kv_heads=8, keep=HALF_ON_HOST),
    Case("2x4, a third on the device", 2, 4, heads=8, kv_heads=2, keep=LayerKeep(attention_rows=1 / 3)),
    Case("1x8, half on the host", 1, 8, keep=HALF_ON_HOST),
    Case("two groups of 2x2, attention again", 2, 2, keep=LayerKeep("host", "device", 0.0)),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, Location]:
    folder: Path = tmp_path_factory.mktemp("numerics")
    shapes = {(case.heads, case.kv_heads, case.tied) for case in TWO_RANKS + BROKEN + FOUR_RANKS + EIGHT_RANKS}
    models = {
        (heads, kv, tied): write_model(folder / f"model-{heads}-{kv}-{tied}", kv, tied=tied, heads=heads)
        for heads, kv, tied in shapes
    }
    return models, write_packed(folder / "packed", *problem(), STARTS)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(case: Case, answers: list[Answer], expected: Answer) -> None:
    clip = case.changes.get("gradient_clip")
    shrink = 1.0 if clip is None else clip / expected.grad_norm
    for answer in answers:
        assert answer.loss == pytest.approx(expected.loss, rel=RELATIVE), case.name
        assert answer.grad_norm == pytest.approx(expected.grad_norm, rel=RELATIVE), case.name
        assert answer.gradients.keys() == expected.gradients.keys(), case.name
    for name, gradient in expected.gradients.items():
        if len(answers) == 2:
            assert distance(answers[0].gradients[name], gradient) < RELATIVE, (case.name, name)
        assert distance(answers[-1].gradients[name], gradient * shrink) < RELATIVE_BY_STEP / shrink, (case.name, name)


@pytest.mark.parametrize(("world_size", "cases"), [(2, TWO_RANKS + BROKEN), (4, FOUR_RANKS), (8, EIGHT_RANKS)])
def test_every_case_equals_one_process(files, world_size: int, cases: list[Case]) -> None:
    models, packed = files
    solved = run_distributed(solve, world_size, models, packed, cases)
    for index, case in enumerate(cases):
        expected = reference(models[case.heads, case.kv_heads, case.tied], bool(case.changes.get("mask_documents")))
        if case.changes.get("gradient_clip"):
            assert expected.grad_norm > 2 * case.changes["gradient_clip"]  # else nothing would be clipped
        for by_rank in solved:
            with pytest.raises(AssertionError) if case.broken else contextlib.nullcontext():
                check(case, by_rank[index], expected)
