"""Parts of a step from literal trace events, microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from ultralong_ray.planner import steptime
from ultralong_ray.watch.trace_events import ATTENTION_SPAN, PREDICTED, predicted_parts, step_parts


def event(cat: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration}


def test_on_a_gpu_a_transfer_costs_what_computation_does_not_cover() -> None:
    events = [
        event("kernel", "flash_fwd", 0, 100),
        event("kernel", "nvjet_gemm", 100, 200),
        event("kernel", "elementwise_kernel", 300, 50),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 200, 200),  # 50 of it after the last kernel
        event("kernel", "ncclDevKernel_AllGather", 250, 200),  # 50 of it beside nothing
        event("cuda_runtime", "cudaLaunchKernel", 0, 1000),
        event("cpu_op", "aten::mm", 0, 1000),
    ]
    parts = step_parts(events, on_gpu=True, step_seconds=600e-6)
    microseconds = {part: round(seconds * 1e6) for part, seconds in parts.items()}
    assert microseconds == {
        "attention": 100,
        "gemm": 200,
        "elementwise": 50,
        "transfer": 50,
        "communication": 50,
        "other": 150,
    }


def test_on_a_cpu_products_inside_attention_are_attention() -> None:
    events = [
        event("user_annotation", ATTENTION_SPAN, 0, 100),
        event("cpu_op", "aten::bmm", 20, 50),
        event("cpu_op", "aten::mm", 100, 80),
        event("cpu_op", "aten::linear", 100, 200),
        event("cpu_op", "gloo:all_to_all", 200, 40),
        event("cpu_op", "aten::add", 240, 10),
        {"ph": "i", "cat": "cpu_op", "name": "aten::mm"},
    ]
    parts = step_parts(events, on_gpu=False, step_seconds=300e-6)
    assert parts["attention"] == pytest.approx(100e-6) and parts["gemm"] == pytest.approx(80e-6)
    assert parts["communication"] == pytest.approx(40e-6) and parts["other"] == pytest.approx(80e-6)
    assert sum(parts.values()) == pytest.approx(300e-6)


def test_parts_of_the_planner_are_all_known() -> None:
    source = steptime.__file__
    with open(source) as file:
        text = file.read()
    assert [name for name in PREDICTED if f'"{name}"' not in text] == []
    assert predicted_parts({"attention forward": 1.0, "attention again": 0.5, "ring not hidden": 0.25, "new": 2.0}) == {
        "attention": 1.5,
        "communication": 0.25,
        "other": 2.0,
    }
