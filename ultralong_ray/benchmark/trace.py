"""Where the GPU's time went in a step, from the profiler's own time stamps: kernels by kind, and what ran beside what.

Flows in: a step to run, or the events of a Chrome trace (torch.profiler of torch 2.11-2.13). Flows out: seconds.
An overlap is the length of the intersection of two unions of intervals, over all streams of the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.watch.trace_events import Interval, intersection, kind_of, length, union

COMPUTE = ("attention", "gemm", "elementwise and other")
TRANSFERS = ("nccl", "memcpy HtoD", "memcpy DtoH")
LARGEST_SHOWN, NAME_CHARACTERS = 16, 100


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by kind, and how much of each transfer lay beside compute kernels.

    events: those of a Chrome trace, `ts` and `dur` in microseconds. A share is None where nothing was transferred.
    NCCL's time holds its wait for the slowest rank.
    """
    spans: dict[str, list[Interval]] = {}
    moved_bytes: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for event in events:
        kind = kind_of(str(event.get("cat", "")).lower(), event.get("name", "")) if event.get("ph") == "X" else None
        if kind is None:
            continue
        start = float(event["ts"])
        spans.setdefault(kind, []).append((start, start + float(event["dur"])))
        by_name.setdefault(event["name"], []).append(float(event["dur"]) / 1e6)
        moved_bytes[kind] = moved_bytes.get(kind, 0.0) + float(event.get("args", {}).get("bytes", 0.0))
    everything = union(interval for intervals in spans.values() for interval in intervals)
    compute = union(interval for kind in COMPUTE for interval in spans.get(kind, []))
    span = everything[-1][1] - everything[0][0] if everything else 0.0
    return {
        "span_seconds": span / 1e6,
        "compute_busy_seconds": length(compute) / 1e6,
        "idle_seconds": (span - length(everything)) / 1e6,
        "kinds": {
            kind: {"seconds": sum(end - start for start, end in intervals) / 1e6, "events": len(intervals)}
            for kind, intervals in sorted(spans.items())
        },
        "largest": [
            {"name": name[:NAME_CHARACTERS], "seconds": sum(seconds), "events": len(seconds)}
            for name, seconds in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LARGEST_SHOWN]
        ],
        "transfers": {kind: _transfer(spans.get(kind, []), compute, moved_bytes.get(kind, 0.0)) for kind in TRANSFERS},
    }


def _transfer(intervals: list[Interval], compute: list[Interval], moved_bytes: float) -> dict[str, float | None]:
    busy = union(intervals)
    beside = length(intersection(busy, compute))
    seconds = length(busy) / 1e6
    return {
        "seconds": seconds,
        "beside_compute_share": beside / length(busy) if busy else None,
        "exposed_seconds": seconds - beside / 1e6,
        "gbytes": moved_bytes / 1e9,
        "gbytes_per_second": moved_bytes / 1e9 / seconds if seconds and moved_bytes else None,
    }


def traced(step: Callable[[], Any], device: torch.device, folder: Path) -> dict[str, Any]:
    """Run one step on every rank, the profiler on rank 0. Returns its summary there, a reason elsewhere."""
    if device.type != "cuda":
        step()
        return {"reason": "no GPU, nothing to trace"}
    if dist.get_rank() != 0:
        step()
        torch.cuda.synchronize(device)
        return {"reason": "rank 0 has the trace"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    summary = summarise(json.loads(path.read_text())["traceEvents"])
    path.unlink()
    return summary
