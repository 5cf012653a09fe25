"""From raw timings of ranks to what the JSON says: FLOPs in all three conventions, MFU, throughput, the prediction.

Flows in: answers of ranks. Flows out: plain dicts. Every figure that depends on a convention names it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from ultralong_ray.benchmark.setups import Benchmark, Setup
from ultralong_ray.flops import ModelShape, ledger, mfu
from ultralong_ray.parallel.allocator import VARIABLES
from ultralong_ray.planner.hardware import cluster_of, find_gpu, peak_flops
from ultralong_ray.planner.predict import predict
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "flash-attn-4",
    "flash-attn",
    "flash-attn-3",
    "ring-flash-attn",
    "accelerate",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
    "triton",
)
GIB = 2**30


def environment(device: str) -> dict[str, Any]:
    """Where the command runs: GPUs, driver, versions, git revision, host memory."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = (
        _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]) if device != "cpu" else ""
    )
    root = str(Path(__file__).resolve().parents[2])
    return {
        "gpus": (gpus or "").splitlines(),
        "python": platform.python_version(),
        "versions": versions,
        "git_revision": _output(["git", "-C", root, "rev-parse", "HEAD"]),
        "git_changes": bool(_output(["git", "-C", root, "status", "--porcelain"])),
        "PYTORCH_ALLOC_CONF": next((os.environ[name] for name in VARIABLES if name in os.environ), None),
        "cpu_count": os.cpu_count(),
        "host_memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
    }


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def described(contestant: str, setup: Setup) -> dict[str, Any]:
    """The fields of a setup that mean something to a contestant."""
    if contestant == "ours":
        return dataclasses.asdict(setup)
    return {"length": setup.length, "layers": setup.layers, "sequence_parallel_degree": setup.plan.degree}


def entry(
    benchmark: Benchmark, contestant: str, setup: Setup, answers: list[dict[str, Any]], found: dict[str, Any]
) -> dict[str, Any]:
    """A finished contestant: `answers` by rank, `found` is the environment. A step lasts as long as on its slowest
    rank."""
    first = answers[0]
    by_step = [max(times) for times in zip(*(answer["step_seconds"] for answer in answers), strict=True)]
    median = statistics.median(by_step)
    groups = benchmark.num_ranks // setup.plan.degree
    is_ours = contestant == "ours"
    plan = setup.plan if is_ours else _peer_plan(setup)
    flops = ledger(ModelShape.from_config(benchmark.config(setup.layers)), setup.length, plan).times(groups)
    peak = peak_flops(first["device"], None) if benchmark.ranks_per_gpu == 1 else None
    memory = {key: [answer[key] for answer in answers] for key in first if key.startswith("peak_")}
    # Whatever a contestant answers beside times and memory is passed on as rank 0 has it: trace, gradients, check.
    extras = {key: value for key, value in first.items() if key not in memory and key != "step_seconds"}
    record = {
        "contestant": contestant,
        "status": "ok",
        "setup": described(contestant, setup),
        "median_step_seconds": median,
        "step_seconds": by_step,
        "tokens_per_second_per_gpu": groups * setup.length / median / benchmark.num_gpus,
        "mfu_causal": mfu(flops.model_flops_causal, median, benchmark.num_gpus, peak),
        "flops_per_step": {
            "model, causal (6Ns + 6Lhs^2)": flops.model_flops_causal,
            "ALST-style (8Ns + 16Lhs^2)": flops.alst_flops,
            "hardware": flops.hardware_flops if is_ours else None,
        },
        **extras,
        "by_rank": memory,
    }
    if is_ours:
        host_gib = found["host_memory_gib"]
        record["predicted"] = predicted(benchmark, setup, first, host_gib)
        if prediction := record["predicted"].get("step_seconds"):
            allocated = max(memory["peak_gpu_gib"])
            record["predicted"]["step_seconds_error"] = prediction / median - 1.0
            record["predicted"]["peak_gpu_error"] = record["predicted"]["peak_gpu_gib"] / allocated - 1.0
    return record


def _peer_plan(setup: Setup) -> TrainPlan:
    """For the conventions that ask for no more than the shape; a peer's hardware FLOPs are not stated."""
    recompute = LayerKeep("device", "device", 0.0)
    return TrainPlan(setup.ulysses, setup.ring, (recompute,) * setup.layers, 1, 1, False)


def predicted(benchmark: Benchmark, setup: Setup, answer: dict[str, Any], host_gib: float) -> dict[str, Any]:
    """The planner's figures for a setup with the kernel and GPU that a rank reports, or why there are none."""
    if benchmark.ranks_per_gpu > 1:
        return {"reason": "ranks share GPUs, which the planner does not know"}
    gpu = find_gpu(answer["device"])
    if gpu is None:
        return {"reason": f"the planner does not know {answer['device']}"}
    hardware = cluster_of(gpu.name, benchmark.num_gpus, host_memory_gib_per_node=host_gib)
    shape = ModelShape.from_config(benchmark.config(setup.layers))
    try:
        first_step = bool(benchmark.check_rows) or benchmark.warmup + benchmark.steps == 1
        prediction = predict(shape, setup.length, setup.plan, hardware, kernel=answer["kernel"], first_step=first_step)
    except UserError as error:
        return {"reason": str(error)}
    return {
        "step_seconds": prediction.step_seconds,
        "peak_gpu_gib": prediction.memory.allocated_gib,
        "seconds_by_part": prediction.time,
        "peak_gib_by_part": prediction.memory.peak[1],
        "peak_at": prediction.memory.peak[0],
        "fits": prediction.fits,
    }


def comparison(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every finished run against the first. A ratio above 1: the first is faster."""
    finished = [run for run in runs if run["status"] == "ok"]
    if len(finished) < 2 or finished[0] is not runs[0]:
        return {}
    first = finished[0]
    return {
        "with": "the first run",
        "others": [_against(first, other) for other in finished[1:]],
        **_recompute_removed(finished),
    }


def _against(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    is_ours = other["contestant"] == "ours"
    same_work = all(first["setup"][key] == other["setup"][key] for key in ("length", "layers"))
    shares = (first["mfu_causal"], other["mfu_causal"])
    result: dict[str, Any] = {
        "contestant": other["contestant"],
        "setup": {key: value for key, value in other["setup"].items() if not is_ours or value != first["setup"][key]},
        "mfu_ratio": None if None in shares else shares[0] / shares[1],
        "step_seconds_ratio": other["median_step_seconds"] / first["median_step_seconds"] if same_work else None,
        "first_loss_relative_difference": abs(other["losses"][0] / first["losses"][0] - 1) if same_work else None,
    }
    if tensors := other.get("gradients", {}).get("tensors"):
        losses = (first["gradients"]["loss"], other["gradients"]["loss"])
        lowest = min(tensors, key=lambda name: tensors[name]["cosine"])
        result["gradients"] = {
            "loss_relative_difference": abs(losses[1] / losses[0] - 1),
            "lowest_cosine": tensors[lowest]["cosine"],
            "lowest_cosine_tensor": lowest,
        }
    return result


def _recompute_removed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Where runs differ in kept rows alone: the share of the attention's recompute time that each amount removes."""
    if len({tuple((k, v) for k, v in run["setup"].items() if k != "rows") for run in runs}) > 1:
        return {}
    by_rows = {run["setup"]["rows"]: run["median_step_seconds"] for run in runs}
    if not {0.0, 1.0} < set(by_rows):
        return {}
    whole = by_rows[0.0] - by_rows[1.0]
    return {"recompute_removed_by_rows": {str(rows): (by_rows[0.0] - t) / whole for rows, t in by_rows.items()}}
