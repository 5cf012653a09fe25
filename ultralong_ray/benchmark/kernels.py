"""`python jobs/benchmark.py kernels ...`: TFLOP/s of attention kernels alone, causal, by length and head_dim.

The planner's attention rates come from such figures (planner/hardware.py). FLOPs are counted as there: a causal forward
of `heads` query heads is 2 * heads * head_dim * seq^2, a backward 2.5 forwards. Written for one process and one device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least
from ultralong_ray.flops import FLASH_BACKWARD_SHARE
from ultralong_ray.parallel.kernels.choose import CANDIDATES, choose_kernel
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.planner.hardware import TERA
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError


def add_kernels(add: Any) -> None:
    """The verb's arguments."""
    names = [candidate.name for candidate in CANDIDATES]
    add("--kernels", nargs="+", default=["auto"], help=f"auto, or some of {', '.join(names)}")
    add("--lengths", type=at_least(1), nargs="+", default=[32768, 131072], help="tokens")
    add("--head-dims", type=at_least(1), nargs="+", default=[128])
    add("--heads", type=at_least(1), default=8, help="query heads")
    add("--kv-heads", type=at_least(1), default=2)
    add("--repeats", type=at_least(1), default=3, help="timed passes; the median counts")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", required=True, help="JSON file")


def run_kernels(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Measure, write `options.out` after every row, and return what was written.

    Raises: UserError for heads that KV heads do not divide. A kernel that cannot run leaves its reason in its row.
    """
    if options.heads % options.kv_heads:
        raise UserError(f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}; give one that does")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fields = ("kernels", "lengths", "head_dims", "heads", "kv_heads", "repeats", "precision")
    result = {
        "command": command,
        "environment": environment(device.type),
        "asked": {name: getattr(options, name) for name in fields},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "rows": [],
    }
    for name in options.kernels:
        for head_dim in options.head_dims:
            for length in options.lengths:
                result["rows"].append(_row(options, name, head_dim, length, device))
                Location.of(options.out).write_json(result)
    return result


def _row(options: argparse.Namespace, name: str, head_dim: int, length: int, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": name, "head_dim": head_dim, "length_tokens": length}
    try:
        dtype = getattr(torch, options.precision)
        kernel = choose_kernel(name, device, dtype, head_dim)
        forward, backward = _seconds(kernel, options, head_dim, length, device, dtype)
    except (UserError, torch.OutOfMemoryError) as error:
        return {**row, "status": "failed", "reason": str(error).splitlines()[0]}
    flops = 2.0 * options.heads * head_dim * float(length) ** 2
    return {
        **row,
        "kernel": kernel.name,
        "status": "ok",
        "forward_seconds": forward,
        "backward_seconds": backward,
        "forward_tflops": flops / forward / TERA,
        "backward_tflops": FLASH_BACKWARD_SHARE * flops / backward / TERA,
    }


def _seconds(
    kernel: Kernel, options: argparse.Namespace, head_dim: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Median seconds of (forward, backward) on normal random inputs."""
    random = torch.Generator(device).manual_seed(0)

    def made(heads: int) -> torch.Tensor:  # [1, seq, heads, head_dim]
        return torch.randn(1, length, heads, head_dim, dtype=dtype, device=device, generator=random)

    query, key, value, grad = made(options.heads), made(options.kv_heads), made(options.kv_heads), made(options.heads)
    scale = head_dim**-0.5
    output, lse = kernel.forward(query, key, value, scale, True)
    forward = partial(kernel.forward, query, key, value, scale, True)
    backward = partial(kernel.backward, grad, query, key, value, output, lse, scale, True)
    return _median(forward, options.repeats, device), _median(backward, options.repeats, device)


def _median(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    call()  # compiles
    return statistics.median(_timed(call, device) for _ in range(repeats))


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def kernels_table(result: dict[str, Any]) -> str:
    """A line for each row, for a terminal."""
    lines = [f"{'kernel':14}{'head_dim':>9}{'tokens':>10}{'forward':>10}{'backward':>10}  TFLOP/s"]
    for row in result["rows"]:
        head = f"{row['kernel']:14}{row['head_dim']:>9}{row['length_tokens']:>10}"
        rates = f"{row['forward_tflops']:>10.4g}{row['backward_tflops']:>10.4g}" if row["status"] == "ok" else ""
        lines.append(head + (rates or f"  {row['reason']}"))
    return "\n".join(lines)
