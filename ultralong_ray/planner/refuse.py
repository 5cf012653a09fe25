"""When nothing fits: by how much, and the smallest single change that would, each tried before it is proposed.

Flows in: a section and a cluster for which the search found nothing. Flows out: words, and the changes as the section
and the cluster that they lead to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ultralong_ray.planner.choose import TILES, fastest, keep_policy, legal, workload
from ultralong_ray.planner.costs import COSTS
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.planner.predict import Prediction, predict_work
from ultralong_ray.planner.section import Section
from ultralong_ray.types import TrainPlan, UserError

GPU_FACTORS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LENGTH_STEPS = 16
HOST_STEP_GIB = 16  # proposals are rounded up to this


@dataclass(frozen=True, slots=True)
class Proposal:
    """One change in words, and what is planned once it is made. `best` is the layout that fits then."""

    words: str
    section: Section
    hardware: Hardware
    best: Prediction


class PlanRefused(UserError):
    """Nothing fits. `forced`: the layout that a section spells out to the last field, if it does, so a user who
    doubts the prediction can still run it."""

    def __init__(self, message: str, proposals: tuple[Proposal, ...], forced: TrainPlan | None) -> None:
        super().__init__(message)
        self.proposals = proposals
        self.forced = forced


def refusal(section: Section, hardware: Hardware) -> PlanRefused:
    """Why `section` does not fit on `hardware` and what would help, the smallest change first."""
    found = tuple(proposals(section, hardware))
    given = ", ".join(f"{section.name}.{name} = {_toml(value)}" for name, value in section.given.items())
    lines = [f"{section.name} cannot run on {hardware}: {_shortage(section, hardware)}"]
    if given:
        lines.append(f"  given: {given}")
    if found:
        lines.append(f"  the smallest change that fits: {found[0].words}")
        lines += [f"  or: {proposal.words}" for proposal in found[1:]]
    else:
        lines.append("  no single change was found that fits; more GPUs and a shorter length together would")
    return PlanRefused("\n".join(lines), found, _forced(section, hardware))


def proposals(section: Section, hardware: Hardware) -> Iterator[Proposal]:
    """Changes that make it fit, verified: a field, then host memory, then GPUs, then a shorter sequence."""
    for candidates in (
        _other_fields(section, hardware),
        _more_host_memory(section, hardware),
        _more_gpus(section, hardware),
        _shorter(section, hardware),
    ):
        for words, changed, larger in candidates:
            best = fastest(changed, larger)
            if best is not None:
                yield Proposal(words, changed, larger, best)
                break


Candidates = Iterator[tuple[str, Section, Hardware]]


def _other_fields(section: Section, hardware: Hardware) -> Candidates:
    """Each given field left to the planner, the dearest last; then all of them."""
    for name in reversed(section.given):
        words = f'{section.name}.{name} = "auto" (it is {_toml(section.given[name])})'
        yield words, section.changed(**{name: "auto"}), hardware
    if not section.train.gradient_checkpointing:
        words = f"{section.name}.gradient_checkpointing = true"
        yield words, section.changed(gradient_checkpointing=True), hardware
    if len(section.given) > 1:
        names = ", ".join(section.given)
        yield (
            f'"auto" for {names} of [{section.name}]',
            section.changed(**dict.fromkeys(section.given, "auto")),
            hardware,
        )


def _more_host_memory(section: Section, hardware: Hardware) -> Candidates:
    needed = [p.memory.host_node_gib for p in _leanest(section, hardware) if p.fits_device]
    if needed:
        gib = float(math.ceil(min(needed) / COSTS.host_usable / HOST_STEP_GIB) * HOST_STEP_GIB)
        words = (
            f"{gib:,.0f} GiB of host memory per node instead of {hardware.host_memory_gib_per_node:,.0f} "
            f"(cluster.host_memory_gib_per_node)"
        )
        if gib > hardware.host_memory_gib_per_node:
            yield words, section, replace(hardware, host_memory_gib_per_node=gib)


def _more_gpus(section: Section, hardware: Hardware) -> Candidates:
    """Nodes of the same kind; a node that is not full gets more GPUs first, with host memory in proportion."""
    for factor in GPU_FACTORS:
        number = hardware.num_gpus * factor
        if number > hardware.gpus_per_node and number % hardware.gpus_per_node:
            continue
        growth = min(number, hardware.gpus_per_node) / hardware.gpus_on_a_node
        host = hardware.host_memory_gib_per_node * growth
        larger = replace(hardware, num_gpus=number, host_memory_gib_per_node=host)
        yield f"{number} GPUs (cluster.num_workers; {larger})", section, larger


def _shorter(section: Section, hardware: Hardware) -> Candidates:
    field = "sft.sequence_length" if section.name == "sft" else "prepare.sequence_length"
    for step in range(LENGTH_STEPS - 1, 0, -1):
        length = section.sequence_length * step // LENGTH_STEPS
        yield f"{field} = {length}", replace(section, sequence_length=length), hardware


def _leanest(section: Section, hardware: Hardware) -> list[Prediction]:
    """Per degrees, the layouts that ask least of the GPU: small tiles, no rows more than given, all on the host or
    as many layers on the GPU as it takes."""
    train = section.train
    offload = train.offload_optimizer is True or train.offload_optimizer == "auto"
    mlp = TILES[-1][0] if train.mlp_tile_tokens == "auto" else train.mlp_tile_tokens
    loss = TILES[-1][1] if train.loss_tile_tokens == "auto" else train.loss_tile_tokens
    rows = 0.0 if train.keep_attention_rows == "auto" else train.keep_attention_rows
    found = []
    for degrees in legal(section, hardware.num_gpus):
        for device_layers in range(section.shape.layers + 1) if train.gradient_checkpointing else (0,):
            keep = keep_policy(section, device_layers, rows) if train.gradient_checkpointing else ()
            for offloaded in {offload, train.offload_optimizer is True}:
                plan = TrainPlan(*degrees, keep, mlp, loss, offloaded)
                found.append(predict_work(workload(section, hardware, plan)))
    return found


def _shortage(section: Section, hardware: Hardware) -> str:
    """What is missing even in the leanest layout."""
    leanest = _leanest(section, hardware)
    if not leanest:
        return no_degrees(section, hardware.num_gpus)
    on_device = min(leanest, key=lambda p: p.memory.gib)
    if not on_device.fits_device:
        moment, parts = on_device.memory.peak
        largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
        named = ", ".join(f"{name} {size:.1f}" for name, size in largest)
        return (
            f"at {section.sequence_length:,} tokens a GPU needs {on_device.memory.gib:.1f} GiB at least and has "
            f"{hardware.gpu.memory_gib:g} ({moment}: {named})"
        )
    host = min((p for p in leanest if p.fits_device), key=lambda p: p.memory.host_node_gib)
    return (
        f"at {section.sequence_length:,} tokens the GPUs fit only with {host.memory.host_node_gib:,.0f} GiB of host "
        f"memory per node, and {COSTS.host_usable * hardware.host_memory_gib_per_node:,.0f} of "
        f"{hardware.host_memory_gib_per_node:,.0f} are usable"
    )


def no_degrees(section: Section, num_workers: int) -> str:
    """Words for workers that no pair of degrees fits."""
    train, shape = section.train, section.shape
    per_group = train.micro_batch_sequences
    free = section.changed(sequence_parallel_degree="auto", ulysses_degree="auto", ring_degree="auto")
    pairs = legal(free, num_workers)
    known = ", ".join(f"{ulysses} x {ring}" for ulysses, ring in pairs[:6]) if pairs else "none"
    return (
        f"no Ulysses x ring degrees fit {num_workers} workers, {section.sequence_length:,} tokens, {shape.heads} query "
        f"and {shape.kv_heads} key-value heads and batches of {train.global_batch_sequences} sequences (whole passes "
        f"of {per_group} per group) together with the degrees given; without those: {known}"
    )


def _forced(section: Section, hardware: Hardware) -> TrainPlan | None:
    train, pairs = section.train, legal(section, hardware.num_gpus)
    keeps = ("keep_inputs", "keep_attention", "keep_attention_rows") if train.gradient_checkpointing else ()
    decided = {*keeps, "offload_optimizer", "mlp_tile_tokens", "loss_tile_tokens"} <= set(section.given)
    if len(pairs) != 1 or not decided:
        return None
    assert train.mlp_tile_tokens != "auto" and train.loss_tile_tokens != "auto"
    rows = train.keep_attention_rows
    keep = keep_policy(section, 0, rows) if keeps and rows != "auto" else ()
    return TrainPlan(*pairs[0], keep, train.mlp_tile_tokens, train.loss_tile_tokens, train.offload_optimizer is True)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
