"""`python jobs/benchmark.py checkpoint ...` in the parent process: a Checkpoints in, its JSON and lines for a terminal
out."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from typing import Any

from ultralong_ray.benchmark.checkpoint import Checkpoints
from ultralong_ray.benchmark.launch import RunFailed, run_ranks, set_environment
from ultralong_ray.benchmark.record import GIB, described, environment
from ultralong_ray.storage import Location

MODULE = "ultralong_ray.benchmark.checkpoint"


def run_checkpoints(checkpoints: Checkpoints, command: list[str], out: Location) -> dict[str, Any]:
    """Run it in fresh processes, write `out` and return what was written; a failed run is recorded with its reason.

    Raises UserError for a command that cannot run at all.
    """
    benchmark = checkpoints.benchmark
    benchmark.check()
    set_environment(benchmark.device)
    result: dict[str, Any] = {
        "command": command,
        "setup": {
            "shape": benchmark.shape,
            "gpus": benchmark.num_gpus,
            **described("ours", benchmark.setups[0]),
            "snapshot": checkpoints.snapshot,
            "every": checkpoints.every,
        },
        "environment": environment(benchmark.device),
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = dataclasses.replace(checkpoints, folder=folder)
        try:
            answers = run_ranks(MODULE, benchmark.num_gpus, benchmark.device, work, benchmark.limit_seconds)
            result |= {"status": "ok", **checkpoint_entry(answers)}
        except RunFailed as error:
            result |= {"status": "failed", "reason": str(error)}
    result["seconds"] = round(time.time() - checkpoints.began, 1)
    out.write_json(result)
    return result


def checkpoint_entry(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured, from the `answers` by rank. Steps last alike on all ranks; the loop waits for the slowest."""
    first = answers[0]
    blocked = [max(times) for times in zip(*(answer["blocked_seconds"] for answer in answers), strict=True)]
    waited = [saved["waited_seconds"] for saved in first["saved"]]
    plain, during = statistics.mean(first["plain_seconds"]), statistics.mean(first["checkpointing_seconds"])
    num_bytes = first["saved"][-1]["num_bytes"]
    load_seconds = max(answer["load_seconds"] for answer in answers)
    return {
        "device": first["device"],
        "plain_step_seconds": {"mean": plain, "all": first["plain_seconds"]},
        "checkpointing_step_seconds": {"mean": during, "all": first["checkpointing_seconds"]},
        "added_to_a_step": during / plain - 1,
        "blocked_seconds": {
            "largest": max(blocked),
            "all": blocked,
            "of which waiting for the checkpoint before": waited,
        },
        "bytes": num_bytes,
        "uploaded_seconds": [saved["uploaded_seconds"] for saved in first["saved"]],
        "written_gbytes_per_second": num_bytes / 1e9 / min(saved["uploaded_seconds"] for saved in first["saved"]),
        "load_seconds": load_seconds,
        "read_gbytes_per_second": num_bytes / 1e9 / load_seconds,
        "peak_host_gib_by_rank": [answer["peak_host_gib"] for answer in answers],
    }


def checkpoint_table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    plain, during = (result[key]["mean"] for key in ("plain_step_seconds", "checkpointing_step_seconds"))
    blocked = result["blocked_seconds"]
    waited = max(blocked["of which waiting for the checkpoint before"])
    return "\n".join(
        (
            f"step     {plain:.3f} s, {during:.3f} s with checkpoints ({result['added_to_a_step']:+.1%})",
            f"blocked  {blocked['largest']:.3f} s at most per checkpoint, {waited:.3f} s of it for the one before",
            f"written  {result['bytes'] / GIB:.2f} GiB at {result['written_gbytes_per_second']:.2f} GB/s, beside steps",
            f"loaded   in {result['load_seconds']:.2f} s, {result['read_gbytes_per_second']:.2f} GB/s",
        )
    )
