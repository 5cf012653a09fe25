"""Names of GPUs and clusters, and rates between the measured lengths."""

from __future__ import annotations

import json

import pytest

from tests.planner.shapes import ROOT
from ultralong_ray.planner.hardware import GPUS, H100_ATTENTION, cluster_of, find_gpu, parse_cluster, peak_flops
from ultralong_ray.types import UserError


@pytest.mark.parametrize(
    ("text", "gpus", "nodes", "host"),
    [("4xH200", 4, 1, 1024), ("8xh100", 8, 1, 2048), ("16x8xH100", 128, 16, 2048), ("2x4xA100", 8, 2, 512)],
)
def test_clusters_by_name(text: str, gpus: int, nodes: int, host: float) -> None:
    hardware = parse_cluster(text)
    assert (hardware.num_gpus, hardware.num_nodes, hardware.host_memory_gib_per_node) == (gpus, nodes, host)


def test_what_is_given_overrules_the_table() -> None:
    hardware = parse_cluster("2x8xH100", 900, 12.5)
    assert (hardware.host_memory_gib_per_node, hardware.network_gbytes_per_second) == (900, 12.5)
    assert "900 GiB" in str(hardware) and "12.5 GB/s" in str(hardware)


@pytest.mark.parametrize("text", ["H100", "0xH100", "8x", "-1xH100"])
def test_clusters_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write 4xH200 or 16x8xH100"):
        parse_cluster(text)


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'V100'.*H100, H200, A100, B200"):
        cluster_of("V100", 8)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("A100-80G", "A100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("A100-40G", None),
        ("GB200", None),
        ("L40S", None),
        (None, None),
    ],
)
def test_devices_as_torch_and_ray_name_them(device: str | None, name: str | None) -> None:
    gpu = find_gpu(device)
    assert (gpu and gpu.name) == name


def test_peaks_are_known_or_given_or_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", None) == 989.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", 100.0) == 100e12
    assert peak_flops(None, None) is None and peak_flops("some card", None) is None


def test_rates_are_the_measured_ones_and_between_them() -> None:
    gpu = GPUS["H100"]
    for kernel, rows in H100_ATTENTION.items():
        for length, forward, backward in rows:
            assert gpu.attention_tflops(kernel, length) == (forward, backward)
    assert gpu.attention_tflops("flash_attn_4", 1024) == (729, 682)
    assert gpu.attention_tflops("flash_attn_4", 2**24) == (569, 591)
    forward, backward = gpu.attention_tflops("flash_attn_4", 65_536)
    assert forward == pytest.approx((729 + 699) / 2) and backward == pytest.approx((682 + 638) / 2)


def test_an_unmeasured_gpu_reaches_the_same_share_of_its_peak() -> None:
    forward, _ = GPUS["A100"].attention_tflops("flash_attn_2", 131_072)
    assert forward / 312.0 == pytest.approx(699 / 989.5)


def test_narrow_heads_reach_the_measured_share() -> None:
    """Of each pass at 128K and 512K, both sizes of heads on one machine."""
    measured = json.loads((ROOT / "jobs" / "results" / "attention_kernels_1xh200.json").read_text())
    rates = {(row["head_dim"], row["length_tokens"]): row for row in measured["rows"]}
    for gpu in (GPUS["H100"], GPUS["B200"]):
        for length in (131_072, 524_288):
            wide, narrow = (gpu.attention_tflops("flash_attn_4", length, head_dim) for head_dim in (128, 64))
            for index, name in enumerate(("forward_tflops", "backward_tflops")):
                found = rates[64, length][name] / rates[128, length][name]
                assert narrow[index] / wide[index] == pytest.approx(found, rel=0.01)
    assert GPUS["H100"].attention_tflops("cudnn", 131_072, 64) == GPUS["H100"].attention_tflops("cudnn", 131_072)
