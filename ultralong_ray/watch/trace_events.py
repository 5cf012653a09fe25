"""What a profiler's trace says of a step: events of a Chrome trace in (torch.profiler of torch 2.11-2.13), seconds out.

An overlap is the length of the intersection of two unions of intervals, over all streams and threads. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

Interval = tuple[float, float]

# The first pattern that matches decides: flash-attn-4's kernels are called cutlass as well.
KINDS = (
    ("nccl", re.compile(r"nccl", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|sdpa|attn|attention", re.IGNORECASE)),
    ("gemm", re.compile(r"gemm|cutlass|nvjet|xmma|wgmma|cublas|matmul|s\d+16816", re.IGNORECASE)),
)
ATTENTION_SPAN = "ultralong attention"  # around every call of an attention kernel; tells it apart on a CPU
MATRIX_OPERATORS = re.compile(r"aten::(mm|bmm|addmm|addmm_|addmv|mv|baddbmm)")
COLLECTIVES = re.compile(r"gloo:|nccl:|c10d::")
# In this order a moment is counted: what runs beside computation costs only the time that computation does not cover.
PARTS = ("attention", "gemm", "elementwise", "transfer", "communication")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals in ascending order that cover the same points."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def length(disjoint: Iterable[Interval]) -> float:
    return sum(end - start for start, end in disjoint)


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """What two unions have in common; both disjoint and ascending."""
    common: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return common


def kind_of(category: str, name: str) -> str | None:
    """What a trace event did on the GPU; None for one that did not run there."""
    if category == "gpu_memcpy":
        direction = re.search(r"HtoD|DtoH", name)
        return f"memcpy {direction.group()}" if direction else "memcpy on the device"
    if category != "kernel":
        return None
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "elementwise and other")


def part_of(category: str, name: str, on_gpu: bool) -> str | None:
    """The part of a step, one of PARTS, that an event belongs to; None where it belongs to none.

    On a GPU kernels count. On a CPU operators do, and what is no matrix product and not attention stays uncounted.
    """
    if on_gpu:
        kind = kind_of(category, name)
        names = {"nccl": "communication", "attention": "attention", "gemm": "gemm", "memcpy HtoD": "transfer"}
        names |= {
            "memcpy DtoH": "transfer",
            "elementwise and other": "elementwise",
            "memcpy on the device": "elementwise",
        }
        return None if kind is None else names[kind]
    if category == "user_annotation" and name == ATTENTION_SPAN:
        return "attention"
    if COLLECTIVES.match(name):
        return "communication"
    return "gemm" if category == "cpu_op" and MATRIX_OPERATORS.fullmatch(name) else None


def step_parts(events: Iterable[dict[str, Any]], on_gpu: bool, step_seconds: float) -> dict[str, float]:
    """Part -> seconds; they add up to `step_seconds`, "other" being what no part accounts for.

    A moment with several parts counts for the first of PARTS: a transfer costs what computation does not cover.
    """
    spans: dict[str, list[Interval]] = {part: [] for part in PARTS}
    for event in events:
        if event.get("ph") != "X":
            continue
        part = part_of(str(event.get("cat", "")).lower(), str(event.get("name", "")), on_gpu)
        if part is not None:
            start = float(event["ts"])
            spans[part].append((start, start + float(event["dur"])))
    seconds: dict[str, float] = {}
    before: list[Interval] = []
    for part in PARTS:
        counted = union([*before, *spans[part]])
        seconds[part] = (length(counted) - length(before)) / 1e6
        before = counted
    seconds["other"] = max(0.0, step_seconds - sum(seconds.values()))
    return seconds


# Names of the planner's parts (planner/steptime.py) -> ours.
PREDICTED = {
    "attention forward": "attention",
    "attention backward": "attention",
    "attention again": "attention",
    "matrices": "gemm",
    "head and loss": "gemm",
    "elementwise": "elementwise",
    "optimizer": "elementwise",
    "Ulysses exchange": "communication",
    "ring not hidden": "communication",
    "ZeRO not hidden": "communication",
    "host transfer not hidden": "transfer",
}


def predicted_parts(parts: dict[str, float]) -> dict[str, float]:
    """The planner's parts of a step as ours, seconds."""
    seconds: dict[str, float] = {}
    for name, value in parts.items():
        part = PREDICTED.get(name, "other")
        seconds[part] = seconds.get(part, 0.0) + value
    return seconds
