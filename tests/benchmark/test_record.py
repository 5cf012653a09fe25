"""From timings of ranks to the record: conventions, ratios, and what stands beside a prediction."""

from __future__ import annotations

from typing import Any

import pytest

from ultralong_ray.benchmark.record import comparison, entry
from ultralong_ray.benchmark.setups import Benchmark, Setup

H200 = {"host_memory_gib": 1000.0}


def setup(**changes: Any) -> Setup:
    return Setup(**{"length": 131072, "layers": 32, "ulysses": 4, "ring": 1, **changes})


def answers(seconds: list[float], **extras: Any) -> list[dict[str, Any]]:
    """Of two ranks; the second is 10 % slower."""
    answer = {"kernel": "flash_attn_4", "device": "NVIDIA H200", "losses": [11.7], "peak_gpu_gib": 60.0, **extras}
    return [{**answer, "step_seconds": [s * factor for s in seconds]} for factor in (1.0, 1.1)]


def test_a_published_step_has_its_published_utilisation() -> None:
    """10.8 s at 128K over 4 H200 is MFU 0.453 in causal model FLOPs; ALST's counter gives more for the same step."""
    benchmark = Benchmark("llama31_8b", 4, "cuda", (setup(),))
    record = entry(benchmark, "ours", setup(), answers([10.8 / 1.1, 20.0, 1.0]), H200)
    assert record["median_step_seconds"] == pytest.approx(10.8)
    assert record["mfu_causal"] == pytest.approx(0.453, abs=0.002)
    assert record["tokens_per_second_per_gpu"] == pytest.approx(131072 / 10.8 / 4)
    model, alst, hardware = record["flops_per_step"].values()
    assert model < hardware < alst
    assert record["by_rank"]["peak_gpu_gib"] == [60.0, 60.0]
    assert record["predicted"]["step_seconds"] > 0 and record["predicted"]["peak_gpu_gib"] > 0
    assert record["predicted"]["step_seconds_error"] == pytest.approx(record["predicted"]["step_seconds"] / 10.8 - 1)


def test_a_peer_has_neither_prediction_nor_hardware_flops() -> None:
    record = entry(Benchmark("llama31_8b", 4, "cuda", (setup(),)), "alst", setup(), answers([21.1 / 1.1]), H200)
    assert "predicted" not in record and record["flops_per_step"]["hardware"] is None
    assert record["mfu_causal"] == pytest.approx(0.233, abs=0.002)
    assert record["setup"] == {"length": 131072, "layers": 32, "sequence_parallel_degree": 4}


def run(contestant: str, seconds: float, **changes: Any) -> dict[str, Any]:
    made = setup(**changes)
    return entry(Benchmark("llama31_8b", 4, "cuda", (made,)), contestant, made, answers([seconds]), H200)


def test_the_first_run_against_the_others() -> None:
    failed = {"contestant": "torch_cp", "status": "unavailable", "reason": "no", "setup": {}}
    others = comparison([run("ours", 10.0), run("alst", 21.0), failed, run("alst", 5.0, layers=8)])["others"]
    assert [other["contestant"] for other in others] == ["alst", "alst"]
    assert others[0]["step_seconds_ratio"] == pytest.approx(2.1)
    assert others[0]["mfu_ratio"] == pytest.approx(2.1)
    assert others[0]["first_loss_relative_difference"] == 0.0
    assert others[1]["step_seconds_ratio"] is None, "another depth: times say nothing"
    assert others[1]["mfu_ratio"] > 1.5
    assert comparison([failed, run("alst", 5.0)]) == {} == comparison([run("ours", 5.0)])


def test_recompute_removed_by_kept_rows() -> None:
    runs = [run("ours", 10.0), run("ours", 11.0, rows=0.5), run("ours", 14.0, rows=0.0)]
    removed = comparison(runs)["recompute_removed_by_rows"]
    assert removed == {"1.0": 1.0, "0.5": pytest.approx(0.75), "0.0": 0.0}
    assert "recompute_removed_by_rows" not in comparison(runs[:2])
    assert "recompute_removed_by_rows" not in comparison([runs[0], run("ours", 14.0, rows=0.0, keep="host")])
