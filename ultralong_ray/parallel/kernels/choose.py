"""Which attention kernel this process uses: the device, dtype and head_dim in, a Kernel out, the reasons in the log.

The memory-efficient backend of torch is not among them: it is silently wrong beyond 65,536 tokens (pytorch#162588,
#187227).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ultralong_ray.parallel.kernels import cudnn, flash_attn_2, flash_attn_3, flash_attn_4, math, sdpa_flash
from ultralong_ray.parallel.kernels.kernel import Kernel, Setting
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """`refusal` knows a setting, `load` raises ImportError with the reason where a library is not there."""

    name: str
    refusal: Callable[[Setting], str | None]
    load: Callable[[], Kernel]


# Fastest first, as measured on Hopper.
CANDIDATES = (
    Candidate("flash_attn_4", flash_attn_4.refusal, flash_attn_4.load),
    Candidate("flash_attn_3", flash_attn_3.refusal, flash_attn_3.load),
    Candidate("cudnn", cudnn.refusal, cudnn.load),
    Candidate("flash_attn_2", flash_attn_2.refusal, flash_attn_2.load),
    Candidate("sdpa_flash", sdpa_flash.refusal, sdpa_flash.load),
    Candidate("math", math.refusal, math.load),
)


@functools.cache
def choose_kernel(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel `requested`, or for "auto" the first of CANDIDATES that can run. Chosen once a process.

    Raises UserError when a kernel asked for by name cannot run, with the reason and those that can.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    setting = Setting(device.type, capability, dtype, head_dim)
    kernel, refused = select(requested, setting, CANDIDATES, functools.partial(probe, device=device, setting=setting))
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info("attention kernel: %s%s", kernel.name, explain(refused))
    return kernel


def select(
    requested: str, setting: Setting, candidates: tuple[Candidate, ...], attempt: Callable[[Kernel], str | None]
) -> tuple[Kernel, dict[str, str]]:
    """The kernel, and every better one that was passed over with its reason.

    `attempt` runs a loaded kernel and says what went wrong, None for nothing.
    """
    refused: dict[str, str] = {}
    for candidate in candidates:
        if requested not in ("auto", candidate.name):
            continue
        reason = candidate.refusal(setting)
        if reason is None:
            try:
                kernel = candidate.load()
            except (ImportError, OSError) as error:  # OSError: a shared library of another CUDA
                reason = str(error)
            else:
                reason = attempt(kernel)
                if reason is None:
                    return kernel, refused
        refused[candidate.name] = reason
    others = tuple(candidate for candidate in candidates if candidate.name != requested)
    if requested == "auto" or not others:
        raise UserError(f"no attention kernel can run here{explain(refused)}")
    able, refused_too = select("auto", setting, others, attempt)
    raise UserError(
        f'attention = "{requested}" cannot run: {refused.get(requested, "there is no such kernel")}. '
        f'"{able.name}" can; attention = "auto" takes the fastest that can{explain(refused_too)}'
    )


def explain(refused: dict[str, str]) -> str:
    """`; passed over: a, b: needs X; c: not installed`, empty when nothing was passed over."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    said = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return f"; passed over: {'; '.join(said)}" if said else ""


def probe(kernel: Kernel, device: torch.device, setting: Setting) -> str | None:
    """Run both passes once on a small problem, since some libraries fail only then. Nothing is tried on CPU."""
    if device.type != "cuda":
        return None
    query = torch.ones(1, 256, 4, setting.head_dim, dtype=setting.dtype, device=device)
    key = query[:, :, :1]
    try:
        output, lse = kernel.forward(query, key, key, 1.0, True)
        kernel.backward(output, query, key, key, output, lse, 1.0, True)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and loaders raise whatever they like; the reason is what counts
        lines = str(error).strip().splitlines() or [""]
        return f"fails on a small problem: {type(error).__name__} {lines[0][:300]}"
    return None
