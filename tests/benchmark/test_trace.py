"""Interval arithmetic and the summary of a trace, on literal events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ultralong_ray.benchmark.trace import intersection, kind_of, length, summarise, union


def test_union_joins_what_touches_and_drops_what_is_empty() -> None:
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6.5), (9, 9)]) == [(0, 4), (5, 7)]
    assert union([]) == []


def test_intersection_of_disjoint_runs() -> None:
    first, second = [(0.0, 4.0), (5.0, 7.0), (10.0, 12.0)], [(1.0, 2.0), (3.0, 6.0), (7.0, 11.0)]
    common = [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (10.0, 11.0)]
    assert intersection(first, second) == intersection(second, first) == common
    assert intersection(first, []) == []


def test_intersection_agrees_with_counting_points() -> None:
    rng = np.random.default_rng(0)

    def drawn() -> tuple[list[tuple[float, float]], np.ndarray]:
        starts = rng.integers(0, 900, 40)
        pairs = [(float(start), float(start + rng.integers(0, 30))) for start in starts]
        points = np.zeros(1000, bool)
        for start, end in pairs:
            points[int(start) : int(end)] = True
        return union(pairs), points

    for _ in range(20):
        (first, first_points), (second, second_points) = drawn(), drawn()
        assert length(first) == first_points.sum()
        assert length(intersection(first, second)) == (first_points & second_points).sum()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopB_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16>", "gemm"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "nccl"),
        ("triton_poi_fused_mul_silu_0", "elementwise and other"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise and other"),
    ],
)
def test_kernels_are_told_apart(name: str, kind: str) -> None:
    assert kind_of("kernel", name) == kind


def event(cat: str, name: str, start: float, duration: float, **args: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "args": args}


def test_summary_of_a_step() -> None:
    """Microseconds. Compute runs 0-100 and 120-200, a copy 50-150 on another stream, NCCL 190-230, idle 230-250."""
    events = [
        event("kernel", "flash_fwd", 0, 60),
        event("kernel", "some_gemm", 40, 60),  # another stream: overlaps the attention kernel
        event("kernel", "elementwise", 120, 80),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 50, 100, bytes=5e6),
        event("kernel", "ncclDevKernel_AllGather", 190, 40),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 250, 10, bytes=1e6),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1000),
        {"ph": "i", "cat": "kernel", "name": "not a duration"},
    ]
    summary = summarise(events)
    assert summary["span_seconds"] == pytest.approx(260e-6)
    assert summary["compute_busy_seconds"] == pytest.approx(180e-6)
    assert summary["idle_seconds"] == pytest.approx(20e-6)
    assert summary["kinds"]["attention"] == {"seconds": pytest.approx(60e-6), "events": 1}
    out, back, nccl = (summary["transfers"][kind] for kind in ("memcpy DtoH", "memcpy HtoD", "nccl"))
    assert out["beside_compute_share"] == pytest.approx(0.8) and out["exposed_seconds"] == pytest.approx(20e-6)
    assert out["gbytes_per_second"] == pytest.approx(50.0)
    assert back["beside_compute_share"] == 0.0
    assert nccl["beside_compute_share"] == pytest.approx(0.25)


def test_a_trace_without_transfers() -> None:
    summary = summarise([event("kernel", "gemm", 0, 10)])
    assert summary["transfers"]["memcpy HtoD"]["beside_compute_share"] is None
    assert summarise([])["span_seconds"] == 0.0
