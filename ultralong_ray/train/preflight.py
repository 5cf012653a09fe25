"""A few seconds of checks before the first step: the run's own shape, plan and model in, findings or a UserError out.

What they look for fails late or not at all otherwise: a kernel that is wrong at this length, heads that do not divide,
host memory that ends in the first backward pass, a slow link, a RoPE change that was lost. Every check is a function of
plain values; `preflight` runs them on all ranks together and gathers what they found.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ultralong_ray.config import RopeConfig
from ultralong_ray.config.degrees import heads_can_split
from ultralong_ray.model.angles import frequency_tolerance
from ultralong_ray.model.rope import from_hf, inv_freq
from ultralong_ray.parallel.kernels.check import check_kernel, sampled_rows
from ultralong_ray.parallel.kernels.kernel import HALF, Kernel
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.train.bandwidth import measured_gigabytes_per_second, slow_link
from ultralong_ray.train.machine import available_host_bytes, cudnn_wheel, loaded_libraries
from ultralong_ray.types import TrainPlan, UserError

log = logging.getLogger(__name__)

# Attention FLOPs that the kernel check may take: forward over the whole length (35 s at 600 TFLOP/s, for 4M tokens,
# where a step takes an hour) and backward (5 s). One head's forward is computed in any case.
FORWARD_FLOPS = 2e16
BACKWARD_FLOPS = 3e15
# Relative error of a row. Measured: 1.2e-3 for outputs of flash-attn-4 in bfloat16, at 32K as at 4M tokens.
OUTPUT_TOLERANCE = {True: 1e-2, False: 1e-4}  # by: half precision?
GRADIENT_TOLERANCE = {True: 3e-2, False: 1e-3}
RESERVE_BYTES = 4 * 2**30  # of host memory, for what the processes themselves take on


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result. `ok` False stops the run; `warning` is for what only costs time."""

    name: str
    ok: bool
    words: str
    seconds: float = 0.0
    warning: bool = False


@dataclass(frozen=True, slots=True)
class RunShape:
    """The shape of what one rank computes, from config.json, the packed sequences and the section."""

    section: str
    sequence_length: int
    micro_batch_sequences: int
    num_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @staticmethod
    def of(section: str, config: dict[str, Any], sequence_length: int, batch: int, dtype: torch.dtype) -> RunShape:
        """From a Llama-class `config` (config.json)."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layers = config["num_hidden_layers"]
        return RunShape(section, sequence_length, batch, layers, hidden, heads, kv_heads, head_dim, dtype)


def preflight(
    shape: RunShape,
    plan: TrainPlan,
    mesh: SequenceMesh,
    kernel: Kernel,
    rope: tuple[torch.Tensor, dict[str, Any], RopeConfig],
    device: torch.device,
    host_memory_gib: float | None = None,
) -> list[Finding]:
    """Run every check, log the findings on rank 0. Collective over all ranks.

    `rope`: the model's frequencies [head_dim / 2], its config.json, and what the recipe asks. `host_memory_gib`: what
    the recipe says that a node has. Returns this rank's findings. Raises UserError on every rank when a check failed
    on one of them.
    """
    hosts = _gathered(socket.gethostname())
    ranks_on_host = hosts.count(hosts[dist.get_rank()])
    libraries = loaded_libraries("libcudnn")
    stated = int((host_memory_gib or 0) * 2**30)
    cudnn_version = torch.backends.cudnn.version() if device.type == "cuda" else None
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("heads", lambda: heads_finding(shape, plan.ulysses_degree)),
        ("2^31 elements", lambda: boundary_finding(shape, plan, kernel)),
        ("kernel", lambda: kernel_finding(shape, plan, kernel, device)),
        ("cuDNN", lambda: cudnn_finding(kernel.name, cudnn_version, cudnn_wheel(), libraries)),
        ("host memory", lambda: host_memory_finding(shape, plan, ranks_on_host, available_host_bytes(stated))),
        ("RoPE", lambda: rope_finding(*rope)),
    ]
    findings = [_timed(name, check) for name, check in checks]
    findings += bandwidth_findings(mesh, hosts, device)
    _conclude(_gathered([(finding, kernel.name) for finding in findings]))
    return findings


def _timed(name: str, check: Callable[[], Finding]) -> Finding:
    """A check's finding with its time. What it raises is a finding too: other ranks wait to hear of it."""
    began = time.perf_counter()
    try:
        finding = check()
    except Exception as error:
        finding = Finding(name, False, f"{type(error).__name__}: {str(error).strip()[:500]}")
    return replace(finding, seconds=time.perf_counter() - began)


def _conclude(by_rank: list[list[tuple[Finding, str]]]) -> None:
    """Log rank 0's findings and other ranks' complaints; raise UserError with all failures."""
    failures = []
    for rank, rows in enumerate(by_rank):
        for finding, _ in rows:
            complaint = not finding.ok or finding.warning
            if dist.get_rank() == 0 and (rank == 0 or complaint):
                where = f" (rank {rank})" if complaint and len(by_rank) > 1 else ""
                say = log.warning if complaint else log.info
                say("preflight: %s%s: %s (%.1f s)", finding.name, where, finding.words, finding.seconds)
            if not finding.ok:
                failures.append(f"{finding.name}, rank {rank}: {finding.words}")
    kernels = [rows[0][1] for rows in by_rank]
    if len(set(kernels)) > 1:
        failures.append(f"ranks chose different attention kernels, {kernels}; install the same packages on every node")
    if failures:
        raise UserError("preflight failed\n  " + "\n  ".join(dict.fromkeys(failures)))


def heads_finding(shape: RunShape, ulysses_degree: int) -> Finding:
    """Whether Ulysses can split the heads."""
    if heads_can_split(shape.heads, shape.kv_heads, ulysses_degree):
        heads, kv_heads = _local_heads(shape, ulysses_degree)
        return Finding("heads", True, f"{heads} query and {kv_heads} key-value heads a rank")
    words = f"{shape.heads} query and {shape.kv_heads} key-value heads do not divide over {ulysses_degree} ranks"
    return Finding("heads", False, f"{words}; set {shape.section}.ulysses_degree to a divisor of both")


def boundary_finding(shape: RunShape, plan: TrainPlan, kernel: Kernel) -> Finding:
    """How many calls the kernel's limit makes of one rank's query tensor. Fails where one head is beyond it."""
    heads, _ = _local_heads(shape, plan.ulysses_degree)
    per_head = shape.micro_batch_sequences * (shape.sequence_length // plan.ring_degree) * shape.head_dim
    said = f"{per_head * heads:,} query elements a rank"
    limit = kernel.max_elements
    if limit is None or per_head * heads <= limit:
        return Finding("2^31 elements", True, f"{said}, one call of {kernel.name}")
    if per_head > limit:
        return Finding(
            "2^31 elements",
            False,
            f"{said}, and one head's {per_head:,} are beyond what {kernel.name} was run with, {limit:,}; "
            f"raise {shape.section}.ring_degree or lower {shape.section}.micro_batch_sequences",
        )
    calls = -(-heads // (limit // per_head))
    return Finding("2^31 elements", True, f"{said}: at least {calls} calls of {kernel.name}, some heads at a time")


def kernel_finding(shape: RunShape, plan: TrainPlan, kernel: Kernel, device: torch.device) -> Finding:
    """The kernel at the run's own length, on heads cut from tensors of the run's own shape, against float32."""
    heads, kv_heads = _local_heads(shape, plan.ulysses_degree)
    seq, head_dim = shape.sequence_length // plan.ring_degree, shape.head_dim
    fitting = heads if kernel.max_elements is None else max(1, kernel.max_elements // (seq * head_dim))  # in one call
    computed, gradient_rows = check_size(seq, min(heads // kv_heads, fitting), head_dim)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(rows: int, count: int) -> torch.Tensor:
        return torch.randn(1, rows, count, head_dim, dtype=shape.dtype, device=device, generator=generator)

    query, key, value = (drawn(seq, count) for count in (heads, kv_heads, kv_heads))
    errors = check_kernel(
        kernel,
        query[:, :, heads - computed :],  # the last heads: their rows reach the largest offsets
        key[:, :, -1:],
        value[:, :, -1:],
        drawn(gradient_rows, computed),
        head_dim**-0.5,
        sampled_rows(seq, heads * head_dim),
    )
    half = shape.dtype in HALF
    ok = max(errors.output, errors.lse) <= OUTPUT_TOLERANCE[half]
    ok = ok and max(errors.dq, errors.dk, errors.dv) <= GRADIENT_TOLERANCE[half]
    words = (
        f"{kernel.name} at {seq:,} tokens, {computed} of {heads} heads, gradients at {gradient_rows:,}: errors of "
        f"sampled rows against float32: output {errors.output:.1e}, log-sum-exp {errors.lse:.1e}, dq {errors.dq:.1e}, "
        f"dk {errors.dk:.1e}, dv {errors.dv:.1e}"
    )
    remedy = f'; it must not be used here, force another with {shape.section}.attention = "..."'
    return Finding("kernel", ok, words if ok else words + remedy)


def check_size(seq: int, group: int, head_dim: int) -> tuple[int, int]:
    """(query heads, rows of the backward pass) of the check; the forward pass has all rows.

    Kernels are compiled for the number of query heads that share a key-value head: some of them would test another
    kernel than the one that trains, so it is all, or one where all would take too long. Causal FLOPs of one head:
    2 * seq^2 * head_dim forward, 2.5 times that backward.
    """
    heads = group if 2.0 * seq**2 * head_dim * group <= FORWARD_FLOPS else 1
    return heads, min(seq, int(math.sqrt(BACKWARD_FLOPS / (5.0 * head_dim * heads))))


def cudnn_finding(
    kernel_name: str, loaded_version: int | None, wheel_version: str | None, libraries: list[str]
) -> Finding:
    """Whether the cuDNN in use is the one that came with torch. Fails only where attention runs on it.

    Another one, found through LD_LIBRARY_PATH, made torch fall back to slower attention without a word.
    """
    if loaded_version is None or wheel_version is None:
        return Finding("cuDNN", True, "not used" if loaded_version is None else "no wheel to compare with")
    major, minor, patch = (int(part) for part in wheel_version.split(".")[:3])
    expected = major * 10000 + minor * 100 + patch
    foreign = [path for path in libraries if "/nvidia/cudnn/" not in path]
    if loaded_version == expected and not foreign:
        return Finding("cuDNN", True, f"{wheel_version}, the one that came with torch")
    words = (
        f"version {loaded_version} is loaded from {', '.join(foreign) or 'an unknown place'}, torch came with "
        f"{wheel_version} ({expected}); take the other one out of LD_LIBRARY_PATH"
    )
    return Finding("cuDNN", kernel_name != "cudnn", words, warning=True)


def kept_host_bytes(shape: RunShape, plan: TrainPlan) -> int:
    """Host memory that one rank's plan fills between forward and backward."""
    rows = shape.micro_batch_sequences * shape.sequence_length // plan.degree
    element = shape.dtype.itemsize
    inputs = rows * shape.hidden_size * element
    attention = rows * shape.heads * (shape.head_dim * element + 4)  # the log-sum-exp is float32
    return sum(
        (inputs if keep.inputs == "host" else 0)
        + (int(attention * keep.attention_rows) if keep.attention == "host" else 0)
        for keep in plan.keep
    )


def host_memory_finding(shape: RunShape, plan: TrainPlan, ranks_on_host: int, available_bytes: int) -> Finding:
    """Whether this host can hold what its ranks keep there."""
    needed = kept_host_bytes(shape, plan) * ranks_on_host
    said = (
        f"{ranks_on_host} ranks of this host keep {needed / 2**30:.1f} GiB, {available_bytes / 2**30:.1f} GiB are free"
    )
    if needed == 0 or needed + RESERVE_BYTES <= available_bytes:
        return Finding("host memory", True, said)
    remedy = (
        f"lower {shape.section}.keep_attention_rows, set {shape.section}.keep_inputs or {shape.section}.keep_attention "
        f'to "device", or take more nodes'
    )
    return Finding("host memory", False, f"{said} ({RESERVE_BYTES / 2**30:.0f} GiB must stay free); {remedy}")


def bandwidth_findings(mesh: SequenceMesh, hosts: list[str], device: torch.device) -> list[Finding]:
    """Speed of the groups that share a sequence. Collective over all ranks; a slow link is a warning."""
    findings = []
    for name, group in (("Ulysses all-to-all", mesh.ulysses), ("ring send and receive", mesh.ring)):
        if group is None:
            continue
        began = time.perf_counter()
        speed = measured_gigabytes_per_second(group, device, ring=group is mesh.ring)
        one_host = len({hosts[rank] for rank in dist.get_process_group_ranks(group)}) == 1
        reason = slow_link(speed, one_host) if device.type == "cuda" else None
        words = f"{speed:.1f} GB/s a rank" + (f", {reason}" if reason else "")
        findings.append(Finding(name, True, words, time.perf_counter() - began, reason is not None))
    return findings


def rope_finding(found: torch.Tensor, config: dict[str, Any], asked: RopeConfig) -> Finding:
    """Whether the model turns by the frequencies that its config.json and the recipe ask for.

    `found`: the model's own, radians per token, [head_dim / 2].
    """
    head_dim = 2 * found.numel()
    written = from_hf(config)
    original = written.original_context_length or 0
    expected = inv_freq(written.rope, head_dim, written.theta, original)
    error = float(np.max(np.abs(found.double().cpu().numpy() / expected - 1.0)))
    if not error <= frequency_tolerance(written.rope.factor):  # NaN is no match
        return Finding("RoPE", False, f"the model's frequencies are off by {error:.1e} from those of its config.json")
    # A config.json of before `ntk_scaling` has the raised theta alone, from which the old one cannot be told.
    if asked.scheme not in ("none", "ntk") and asked.factor != 1.0:
        same = (written.rope.scheme, written.rope.factor) == (asked.scheme, asked.factor)
        if not same:
            return Finding(
                "RoPE",
                False,
                f"the model has {written.rope.scheme} with factor {written.rope.factor:g}, the recipe asks for "
                f"{asked.scheme} with factor {asked.factor:g}; run the extend stage again",
            )
    return Finding("RoPE", True, f"{written.rope.scheme}, factor {written.rope.factor:g}, frequencies to {error:.0e}")


def check_first_loss(loss: float, vocab_size: int, pretrained: bool) -> None:
    """Raise UserError when the first step's loss, nats per token, is that of a broken model.

    One that knows nothing has ln(vocab_size). Weights just drawn may have somewhat more; pretrained ones are far below
    it unless their positions, or the weights themselves, were lost.
    """
    chance = math.log(vocab_size)
    limit = chance + (1.0 if pretrained else 3.0)
    if not loss <= limit:
        raise UserError(
            f"the first step's loss is {loss:.2f}, beyond {limit:.2f}; guessing among {vocab_size} tokens has "
            f"{chance:.2f}. Weights, tokenizer and RoPE of the model do not match: run prepare and extend again"
        )


def _local_heads(shape: RunShape, ulysses_degree: int) -> tuple[int, int]:
    """(query heads, key-value heads) of one rank after the all-to-all."""
    return max(1, shape.heads // ulysses_degree), max(1, shape.kv_heads // ulysses_degree)


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
