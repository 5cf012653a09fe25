"""A whole benchmark command: ours in every setup, then the peers, each in fresh processes; the JSON grows by runs."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from ultralong_ray.benchmark.launch import RunFailed, Unavailable, run_ranks, set_environment
from ultralong_ray.benchmark.measure import Work
from ultralong_ray.benchmark.record import comparison, described, entry, environment
from ultralong_ray.benchmark.setups import Benchmark
from ultralong_ray.storage import Location

MODULES = {"ours": "ours", "alst": "alst", "ring_flash_attn": "alst", "torch_cp": "torch_cp"}
START_SECONDS = 25.0  # not worth starting a contestant with less left


def run_benchmark(benchmark: Benchmark, command: list[str], out: Location) -> dict[str, Any]:
    """Run everything, write `out` after each contestant, and return what was written.

    A contestant that cannot run, fails or finds no time left is recorded with the reason and does not stop the others.
    Raises UserError for a command that cannot run at all.
    """
    benchmark.check()
    began = time.time()
    set_environment(benchmark.device)
    found = environment(benchmark.device)
    contestants = [("ours", setup) for setup in benchmark.setups]
    contestants += [(peer, benchmark.peer_setup) for peer in benchmark.peers]
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for contestant, setup in contestants:
            work = Work(benchmark, setup, contestant, folder, began)
            runs.append(_run_contestant(work, found))
            result = {
                "command": command,
                "shape": benchmark.shape,
                "gpus": benchmark.num_gpus,
                "ranks_per_gpu": benchmark.ranks_per_gpu,
                "precision": benchmark.precision,
                "seed": benchmark.seed,
                "environment": found,
                "seconds": round(time.time() - began, 1),
                "comparison": comparison(runs),
                "runs": runs,
            }
            out.write_json(result)
    return result


def _run_contestant(work: Work, found: dict[str, Any]) -> dict[str, Any]:
    benchmark = work.benchmark
    remaining = benchmark.limit_seconds - (time.time() - work.began)
    if remaining < START_SECONDS:
        return _not_run(work, "not run", f"{remaining:.0f} s left of --limit-seconds {benchmark.limit_seconds:.0f}")
    try:
        checks = work.contestant == "ours" and benchmark.check_rows
        module = f"ultralong_ray.benchmark.{'long_check' if checks else MODULES[work.contestant]}"
        answers = run_ranks(module, benchmark.num_ranks, benchmark.device, work, remaining, benchmark.ranks_per_gpu)
    except Unavailable as error:
        return _not_run(work, "unavailable", str(error))
    except RunFailed as error:
        return _not_run(work, "failed", str(error))
    return entry(benchmark, work.contestant, work.setup, answers, found)


def _not_run(work: Work, status: str, reason: str) -> dict[str, Any]:
    print(f"[{time.time() - work.began:7.1f} s] {work.contestant}: {status}: {reason}", flush=True)
    return {
        "contestant": work.contestant,
        "status": status,
        "reason": reason,
        "setup": described(work.contestant, work.setup),
    }


def table(result: dict[str, Any]) -> str:
    """The runs as lines for a terminal."""
    lines = [f"{'run':<36} {'step':>10} {'tokens/s/GPU':>13} {'causal MFU':>10} {'peak GiB':>9} {'loss':>9}"]
    for run in result["runs"]:
        setup = run["setup"]
        name = f"{run['contestant']} {setup['length']:,} x {setup['layers']} layers"
        if run["contestant"] == "ours":
            name += f" {setup['ulysses']}x{setup['ring']} {setup['keep']} {setup['rows']:g}"
        if run["status"] != "ok":
            lines.append(f"{name:<36} {run['status']}: {run['reason'].splitlines()[-1]}")
            continue
        share = "" if run["mfu_causal"] is None else f"{run['mfu_causal']:.3f}"
        peak = max(run["by_rank"].get("peak_gpu_gib", run["by_rank"]["peak_host_gib"]))
        lines.append(
            f"{name:<36} {run['median_step_seconds']:>8.3f} s {run['tokens_per_second_per_gpu']:>13,.0f} {share:>10} "
            f"{peak:>9.2f} {run['losses'][0]:>9.5f}"
        )
    return "\n".join(lines)
