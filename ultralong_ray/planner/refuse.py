"""When nothing fits: by how much, and the smallest single change that would, each tried before it is proposed.

Flows in: a section and a cluster for which the search found nothing. Flows out: words, and the changes as the section
and the cluster that they lead to.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ultralong_ray.config import SftConfig
from ultralong_ray.planner.choose import TILES, fastest, keep_policy, legal, most_on_device, workload
from ultralong_ray.planner.costs import COSTS
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.planner.predict import Prediction, predict_work
from ultralong_ray.planner.section import Section
from ultralong_ray.types import TrainPlan, UserError

MOST_GPUS = 4096  # of a proposal
LEANEST_FIELDS = {"gradient_checkpointing": True, "zero_stage": 3, "micro_batch_sequences": 1}  # all train the same
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
        lines.append("  no single change was found that fits; try more GPUs and a shorter length together")
    return PlanRefused("\n".join(lines), found, _forced(section, hardware))


def proposals(section: Section, hardware: Hardware) -> Iterator[Proposal]:
    """Changes that make it fit, verified: a field, then host memory, GPUs, a shorter sequence, another batch."""
    for candidates in (
        _other_fields(section, hardware),
        _more_host_memory(section, hardware),
        _more_gpus(section, hardware),
        _shorter(section, hardware),
        _other_batch(section, hardware),
    ):
        for words, changed, larger in candidates:
            best = fastest(changed, larger)
            if best is not None:
                yield Proposal(words, changed, larger, best)
                break


Candidates = Iterator[tuple[str, Section, Hardware]]


def _other_fields(section: Section, hardware: Hardware) -> Candidates:
    """Each given field left to the planner, the dearest last; then those that it never sets; then all given ones."""
    for name in reversed(section.given):
        words = f'{section.name}.{name} = "auto" (it is {_toml(section.given[name])})'
        yield words, section.changed(**{name: "auto"}), hardware
    for name, value in LEANEST_FIELDS.items():
        if getattr(section.train, name) != value:
            yield f"{section.name}.{name} = {_toml(value)}", section.changed(**{name: value}), hardware
    if len(section.given) > 1:
        names = ", ".join(section.given)
        yield (
            f'"auto" for {names} of [{section.name}]',
            section.changed(**dict.fromkeys(section.given, "auto")),
            hardware,
        )


def _more_host_memory(section: Section, hardware: Hardware) -> Candidates:
    needed = [leanest.memory.host_node_gib for leanest in _leanest(section, hardware) if leanest.fits_device]
    if needed:
        least = min(needed) / COSTS.host_usable
        gib = float(math.ceil(least / HOST_STEP_GIB) * HOST_STEP_GIB)
        words = (
            f"{gib:,.0f} GiB of host memory per node instead of {hardware.host_memory_gib_per_node:,.0f} "
            f"(cluster.host_memory_gib_per_node)"
        )
        if gib > hardware.host_memory_gib_per_node:
            yield words, section, replace(hardware, host_memory_gib_per_node=gib)


def _more_gpus(section: Section, hardware: Hardware) -> Candidates:
    """The fewest first: a node that is not full gets more, with host memory in proportion; then whole nodes."""
    now, of_node = hardware.num_gpus, hardware.gpus_per_node
    whole_nodes = range((now // of_node + 1) * of_node, MOST_GPUS + 1, of_node)
    for number in itertools.chain(range(now + 1, of_node), whole_nodes):
        growth = min(number, hardware.gpus_per_node) / hardware.gpus_on_a_node
        host = hardware.host_memory_gib_per_node * growth
        larger = replace(hardware, num_gpus=number, host_memory_gib_per_node=host)
        yield f"{number} GPUs (cluster.num_workers; {larger})", section, larger


def _shorter(section: Section, hardware: Hardware) -> Candidates:
    """The longest in sixteenths of the length, found by halving.

    Each is rounded down to tokens that all degrees can split: otherwise a shorter one might fit no better.
    """
    field = "sft.sequence_length" if section.name == "sft" else "prepare.sequence_length"
    length, unit = section.sequence_length, 2 * hardware.num_gpus  # a multiple of every length_unit (config/degrees.py)
    rounded = (length * step // LENGTH_STEPS // unit * unit for step in range(1, LENGTH_STEPS + 1))
    lengths = [tokens for tokens in rounded if 0 < tokens < length]

    def cut(tokens: int) -> Section:
        return replace(section, sequence_length=tokens)

    # the first length that does not fit; all before it do
    limit = bisect.bisect_left(lengths, True, key=lambda tokens: fastest(cut(tokens), hardware) is None)
    if limit > 0:
        shorter = cut(lengths[limit - 1])
        words = f"{field} = {shorter.sequence_length}"
        if isinstance(section.train, SftConfig) and section.train.max_sample_tokens > shorter.sequence_length:
            words += f" and sft.max_sample_tokens = {shorter.sequence_length}"
        yield words, shorter, hardware


def _other_batch(section: Section, hardware: Hardware) -> Candidates:
    """The nearest batch that the groups can share, where they cannot share the one given."""
    per_pass = _least_per_pass(section, hardware.num_gpus)
    batch = section.train.global_batch_sequences
    if per_pass is None or legal(section, hardware.num_gpus):
        return
    below = batch // per_pass * per_pass
    for nearest in sorted(filter(None, (below, below + per_pass)), key=lambda found: abs(found - batch)):
        # the recipe holds its batch against its own workers, which may be others than these
        workers = f"cluster.num_workers = {hardware.num_gpus}"
        words = f"{section.name}.global_batch_sequences = {nearest} (it is {batch}) with {workers}"
        yield words, section.changed(global_batch_sequences=nearest), hardware


def _leanest(section: Section, hardware: Hardware) -> list[Prediction]:
    """Per degrees, the layouts that ask least: small tiles, the fewest rows that the fields allow, with the optimizer
    on either side where it may be. Where the GPU is large enough, as many layers on it as fit; else none."""
    train = section.train
    mlp = TILES[-1][0] if train.mlp_tile_tokens == "auto" else train.mlp_tile_tokens
    loss = TILES[-1][1] if train.loss_tile_tokens == "auto" else train.loss_tile_tokens
    rows = 0.0 if train.keep_attention_rows == "auto" else train.keep_attention_rows
    sides = (False, True) if train.offload_optimizer == "auto" else (train.offload_optimizer,)
    found = []
    for degrees, offload in itertools.product(legal(section, hardware.num_gpus), sides):
        work = workload(section, hardware, TrainPlan(*degrees, (), mlp, loss, offload, section.least_snapshot))
        best = most_on_device(section, work, rows) if train.gradient_checkpointing else None
        if best is None:
            keep = keep_policy(section, 0, rows) if train.gradient_checkpointing else ()
            best = predict_work(replace(work, plan=replace(work.plan, keep=keep)))
        found.append(best)
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
            f"{on_device.work.device_usable_gib:.1f} usable ({moment}: {named})"
        )
    host = min((p for p in leanest if p.fits_device), key=lambda p: p.memory.host_node_gib)
    return (
        f"at {section.sequence_length:,} tokens the GPUs fit only with {host.memory.host_node_gib:,.0f} GiB of host "
        f"memory per node, and {host.work.host_usable_gib:,.0f} of "
        f"{hardware.host_memory_gib_per_node:,.0f} are usable"
    )


def no_degrees(section: Section, num_workers: int) -> str:
    """Words for workers that no pair of degrees fits, the plainest reason first."""
    train, shape, total = section.train, section.shape, section.total
    if total != "auto" and num_workers % total:
        return f"{section.name}.sequence_parallel_degree {total} does not divide {num_workers} workers"
    if per_pass := _least_per_pass(section, num_workers):
        return (
            f"{section.name}.global_batch_sequences {train.global_batch_sequences} is not a multiple of {per_pass}: "
            f"{per_pass // train.micro_batch_sequences} groups at least, each of {train.micro_batch_sequences} "
            f"micro-batch sequences"
        )
    free = section.changed(sequence_parallel_degree="auto", ulysses_degree="auto", ring_degree="auto")
    known = ", ".join(f"{ulysses} x {ring}" for ulysses, ring in legal(free, num_workers)[:6]) or "none"
    return (
        f"no Ulysses x ring degrees suit {num_workers} workers, {section.sequence_length:,} tokens and {shape.heads} "
        f"query and {shape.kv_heads} key-value heads together with the degrees given; without those: {known}"
    )


def _least_per_pass(section: Section, num_workers: int) -> int | None:
    """Sequences that the fewest groups compute in one pass; None where no degrees fit, whatever the batch."""
    whole = num_workers * section.train.micro_batch_sequences  # a batch that any number of groups can share
    pairs = legal(section.changed(global_batch_sequences=whole), num_workers)
    return whole // max(ulysses * ring for ulysses, ring in pairs) if pairs else None


def _forced(section: Section, hardware: Hardware) -> TrainPlan | None:
    train, pairs = section.train, legal(section, hardware.num_gpus)
    keeps = ("keep_inputs", "keep_attention", "keep_attention_rows") if train.gradient_checkpointing else ()
    decided = {*keeps, "offload_optimizer", "mlp_tile_tokens", "loss_tile_tokens"} <= set(section.given)
    if len(pairs) != 1 or not decided:
        return None
    assert train.mlp_tile_tokens != "auto" and train.loss_tile_tokens != "auto"
    rows = train.keep_attention_rows
    keep = keep_policy(section, 0, rows) if keeps and rows != "auto" else ()
    tiles = train.mlp_tile_tokens, train.loss_tile_tokens
    return TrainPlan(*pairs[0], keep, *tiles, train.offload_optimizer is True, section.least_snapshot)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
