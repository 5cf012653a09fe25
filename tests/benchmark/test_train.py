"""The benchmark itself on two CPU processes: ours and ALST agree, setups agree, the float32 reference agrees."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.spawn import run_distributed
from ultralong_ray.benchmark import torch_cp
from ultralong_ray.benchmark.cli import main
from ultralong_ray.benchmark.launch import Unavailable
from ultralong_ray.benchmark.measure import Work
from ultralong_ray.benchmark.setups import Benchmark, Setup

TINY = ["--shape", "tiny", "--device", "cpu", "--gpus", "2", "--length", "128", "--mlp-tile", "16", "--loss-tile", "16"]
SETUP = Setup(length=128, layers=2, ulysses=2, ring=1, mlp_tile=16, loss_tile=16)


@pytest.mark.usefixtures("forked_ranks")
def test_ours_and_alst_through_the_job(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert main(["train", *TINY, "--steps", "1", "--peers", "alst", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    ours, alst = result["runs"]
    assert (ours["status"], alst["status"]) == ("ok", "ok")
    # two steps, so the second loss has felt an update, and the whole gradient before it
    assert ours["losses"] == pytest.approx(alst["losses"], rel=1e-5)
    assert ours["grad_norms"] == pytest.approx(alst["grad_norms"], rel=1e-5)
    assert len(ours["losses"]) == 2 and ours["losses"][0] != ours["losses"][1]
    assert result["comparison"]["others"][0]["first_loss_relative_difference"] < 1e-5
    assert result["environment"]["versions"]["deepspeed"] and result["command"][-1] == str(out)
    assert len(ours["by_rank"]["peak_host_gib"]) == 2 and "reason" in ours["predicted"]
    assert "sdpa" in alst["kernel"] and ours["kernel"] == "sdpa_flash"


def solve(folder: str, cases: list[tuple[str, Benchmark, Setup]]) -> list[dict[str, Any]]:
    """Several commands of ours in one process group, each as its worker would run it."""
    from ultralong_ray.benchmark import long_check, ours

    (Path(folder) / "shared").mkdir(exist_ok=True)
    return [
        (long_check if benchmark.check_rows else ours).run(
            Work(benchmark, setup, "ours", f"{folder}/{name}", time.time()), torch.device("cpu")
        )
        for name, benchmark, setup in cases
    ]


def test_degrees_policies_and_the_reference(tmp_path: Path) -> None:
    def variant(**changes: Any) -> Setup:
        return dataclasses.replace(SETUP, **changes)

    setups = (SETUP, variant(ulysses=1, ring=2), variant(keep="host", rows=0.5), variant(keep="none"))
    compared = Benchmark("tiny", 2, "cpu", setups, steps=1, warmup=0, compare_gradients=True, profile=True)
    one_layer = variant(layers=1, ulysses=1, ring=2, length=256)
    checked = Benchmark("tiny", 2, "cpu", (one_layer,), check_rows=40)
    tied = dataclasses.replace(checked, shape="quickstart")  # the head is the embedding
    cases = [("shared", compared, setup) for setup in setups]
    cases += [("long", checked, one_layer), ("tied", tied, one_layer)]
    *runs, long, long_tied = run_distributed(solve, 2, str(tmp_path), cases)[0]
    assert runs[0]["gradients"]["is_reference"] and not runs[0]["gradients"]["tensors"]
    for run in runs[1:]:
        tensors = run["gradients"]["tensors"]
        assert len(tensors) == 21 and min(tensor["cosine"] for tensor in tensors.values()) > 1 - 1e-9
        assert max(tensor["relative_error"] for tensor in tensors.values()) < 1e-5
        assert run["gradients"]["loss"] == pytest.approx(runs[0]["gradients"]["loss"], rel=1e-6)
    assert runs[0]["trace"] == {"reason": "no GPU, nothing to trace"}
    for check, weights in ((long["check"], 12), (long_tied["check"], 11)):
        assert check["target_rows"] == 40 and check["gradients_finite"]
        assert check["loss"] == pytest.approx(check["reference_loss"], rel=1e-5)
        assert check["output_rows_relative_error"]["max"] < 1e-5
        assert len(check["gradients"]) == weights
        assert max(tensor["relative_error"] for tensor in check["gradients"].values()) < 1e-5


def test_a_short_warm_up_is_not_what_is_timed(tmp_path: Path) -> None:
    benchmark = Benchmark("tiny", 1, "cpu", (dataclasses.replace(SETUP, ulysses=1),), steps=1, warmup_length=32)
    whole = dataclasses.replace(benchmark, warmup_length=None)
    cases = [("a", benchmark, benchmark.setups[0]), ("b", whole, whole.setups[0])]
    short, long = run_distributed(rows_of_steps, 1, str(tmp_path), cases)[0]
    assert short == [32, 128] and long == [128, 128]


def rows_of_steps(folder: str, cases: list[tuple[str, Benchmark, Setup]]) -> list[list[int]]:
    """Rows of every step of a command, the warm-up first."""
    from ultralong_ray.benchmark import ours

    found: list[list[int]] = []
    step = ours.train_step

    def watched(engine: Any, micro_batches: Any, *rest: Any) -> Any:
        found[-1].append(micro_batches[0].input_ids.shape[1])
        return step(engine, micro_batches, *rest)

    ours.train_step = watched
    for case in cases:
        found.append([])
        solve(folder, [case])
    return found


def test_a_missing_peer_has_a_reason() -> None:
    work = Work(Benchmark("tiny", 1, "cpu", (SETUP,)), SETUP, "torch_cp", "", 0.0)
    with pytest.raises(Unavailable, match="no CPU attention"):
        torch_cp.run(work, torch.device("cpu"))
    from ultralong_ray.benchmark import alst

    with pytest.raises(Unavailable, match="needs a GPU"):
        alst.run(dataclasses.replace(work, contestant="ring_flash_attn"), torch.device("cpu"))
