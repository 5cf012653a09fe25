"""GPUs and clusters as numbers: a name or "16x8xH100" in, capacities and rates out.

Attention rates are measured where a row says so, and derived elsewhere: an unmeasured GPU is given the share of its
peak that flash-attn-4 reaches on an H100. Capacities and link speeds are those of data sheets and of torch's
out-of-memory messages; every one can be overruled for a cluster that differs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ultralong_ray.types import UserError

TERA = 1e12
GIGA = 1e9

# kernel -> (sequence length in tokens, forward, backward), TFLOP/s, causal, bfloat16, head_dim 128, backward counted as
# 2.5 forwards. Measured on H100 80GB with torch 2.11, CUDA 13 and flash-attn-4 4.0.0b36; flash-attn-2 stands for
# torch's own flash backend, which is the same code. flash-attn-3: read off MagiAttention's published benchmark.
H100_ATTENTION: dict[str, tuple[tuple[int, float, float], ...]] = {
    "flash_attn_4": (
        (32_768, 729, 682),
        (131_072, 699, 638),
        (1_048_576, 682, 622),
        (4_194_304, 569, 591),
    ),
    "flash_attn_3": ((32_768, 680, 585),),
    "cudnn": ((32_768, 644, 541), (131_072, 539, 549), (1_048_576, 510, 539)),
    "flash_attn_2": ((32_768, 362, 326), (131_072, 334, 325), (1_048_576, 309, 326)),
    "sdpa_flash": ((32_768, 362, 326), (131_072, 334, 325), (1_048_576, 309, 326)),
}
# kernel -> shares of these rates, (forward, backward), that heads of 64 reach: both sizes at 128K and 512K are in
# jobs/results/attention_kernels_1xh200.json. flash-attn-3 has the same schedule; others were not measured so.
NARROW_HEAD_DIM = 64
HEAD_DIM_64_SHARES = {"flash_attn_4": (0.826, 0.875), "flash_attn_3": (0.826, 0.875)}
H100_PEAK_TFLOPS = 989.5


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model of GPU. `measured`: its attention rates are H100_ATTENTION, else derived from the peak."""

    name: str
    memory_gib: float  # what torch reports as total
    peak_tflops: float  # dense bfloat16, data sheet
    memory_gbytes_per_second: float
    nvlink_gbytes_per_second: float  # per direction
    pcie_gbytes_per_second: float  # reached, pinned memory, per direction
    host_gib_per_gpu: float  # host memory of the vendor's own 8-GPU server, divided by 8
    best_kernel: str
    measured: bool

    def attention_tflops(self, kernel: str, sequence_length: int, head_dim: int = 128) -> tuple[float, float]:
        """(forward, backward) TFLOP/s at a sequence length; between measured lengths linear in its logarithm."""
        known = kernel if self.measured else "flash_attn_4"
        forward, backward = _interpolate(H100_ATTENTION[known], sequence_length)
        ratio = 1.0 if self.measured else self.peak_tflops / H100_PEAK_TFLOPS
        shares = HEAD_DIM_64_SHARES.get(kernel, (1.0, 1.0)) if head_dim <= NARROW_HEAD_DIM else (1.0, 1.0)
        return forward * ratio * shares[0], backward * ratio * shares[1]


def _interpolate(rows: tuple[tuple[int, float, float], ...], sequence_length: int) -> tuple[float, float]:
    below = [row for row in rows if row[0] <= sequence_length]
    above = [row for row in rows if row[0] > sequence_length]
    if not below or not above:
        row = above[0] if above else below[-1]
        return row[1], row[2]
    low, high = below[-1], above[0]
    share = math.log(sequence_length / low[0]) / math.log(high[0] / low[0])
    return low[1] + share * (high[1] - low[1]), low[2] + share * (high[2] - low[2])


# The H200 has the H100's chip with more and faster memory; A100 and B200 are derived. PCIe: 4.0 x16 and 5.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 79.1, H100_PEAK_TFLOPS, 3350, 450, 50, 256, "flash_attn_4", True),
        Gpu("H200", 139.8, H100_PEAK_TFLOPS, 4800, 450, 50, 256, "flash_attn_4", True),
        Gpu("A100", 79.2, 312.0, 2039, 300, 24, 128, "flash_attn_2", False),
        Gpu("B200", 178.4, 2250.0, 8000, 900, 50, 256, "flash_attn_4", False),
    )
}
# By kernel, as `refusal` of parallel/kernels/ says there.
GPUS_REFUSED_BY = {"flash_attn_4": ("A100",), "flash_attn_3": ("A100", "B200"), "cudnn": ("A100",)}
NETWORK_GBYTES_PER_SECOND = 50.0  # per GPU and direction: one 400 Gbit/s adapter each, as in the vendor's servers
NVLINK_DOMAIN_GPUS = 8


@dataclass(frozen=True, slots=True)
class Hardware:
    """A cluster of equal nodes, each one NVLink domain. `num_gpus` need not fill the last node."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_memory_gib_per_node: float
    network_gbytes_per_second: float  # per GPU and direction, between nodes

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def gpus_on_a_node(self) -> int:
        """GPUs of the fullest node."""
        return min(self.num_gpus, self.gpus_per_node)

    def __str__(self) -> str:
        node = f"{self.gpus_on_a_node} x {self.gpu.name}"
        where = node if self.num_nodes == 1 else f"{self.num_gpus} x {self.gpu.name} on {self.num_nodes} nodes"
        network = "" if self.num_nodes == 1 else f", {self.network_gbytes_per_second:g} GB/s per GPU between nodes"
        return f"{where}, {self.host_memory_gib_per_node:,.0f} GiB of host memory per node{network}"


def cluster_of(
    gpu_name: str,
    num_gpus: int,
    gpus_per_node: int = NVLINK_DOMAIN_GPUS,
    host_memory_gib_per_node: float | None = None,
    network_gbytes_per_second: float | None = None,
) -> Hardware:
    """A cluster of a GPU of the table, what is not given as the vendor's servers have it. UserError: unknown GPU."""
    gpu = find_gpu(gpu_name)
    if gpu is None:
        raise UserError(f"cluster.gpu {gpu_name!r} is not in the planner's table; it knows {', '.join(GPUS)}")
    host = host_memory_gib_per_node or gpu.host_gib_per_gpu * min(num_gpus, gpus_per_node)
    return Hardware(gpu, num_gpus, gpus_per_node, host, network_gbytes_per_second or NETWORK_GBYTES_PER_SECOND)


def parse_cluster(
    text: str, host_memory_gib_per_node: float | None = None, network_gbytes_per_second: float | None = None
) -> Hardware:
    """ "4xH200" (one node up to 8 GPUs, nodes of 8 beyond) or "16x8xH100" (nodes x GPUs of a node x name).

    Raises UserError for any other text, an unknown GPU, and numbers that are not above 0.
    """
    for flag, value in (("--host-memory-gib", host_memory_gib_per_node), ("--network-gbs", network_gbytes_per_second)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag} {value:g} is not a size; give a number above 0, or leave it out")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([A-Za-z]\w*)", text)
    if match is None:
        raise UserError(f"--cluster {text!r} is not understood; write 4xH200 or 16x8xH100 (nodes x GPUs x name)")
    nodes, gpus, name = match.groups()
    per_node = int(gpus) if nodes else NVLINK_DOMAIN_GPUS
    total = int(gpus) * int(nodes or 1)
    return cluster_of(name.upper(), total, per_node, host_memory_gib_per_node, network_gbytes_per_second)


def find_gpu(device_name: str | None) -> Gpu | None:
    """The GPU that torch ("NVIDIA H100 80GB HBM3"), Ray ("H100") or a recipe names; None where it is not known.

    The planner's A100 is the one with 80 GB.
    """
    words = re.split(r"[^A-Z0-9]+", (device_name or "").upper())
    if "40GB" in words or "40G" in words:
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def peak_flops(device_name: str | None, peak_tflops: float | None) -> float | None:
    """FLOP/s of one device: the given peak, else the table's, else None."""
    if peak_tflops is not None:
        return peak_tflops * TERA
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_tflops * TERA
