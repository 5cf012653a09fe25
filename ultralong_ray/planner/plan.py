"""A recipe's training section and a cluster in; the layout that its workers follow, with its cost and reasons, out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

from ultralong_ray.config import Recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.planner.choose import ROW_STEPS, fastest, fit, keep_policy, legal
from ultralong_ray.planner.hardware import GPUS, GPUS_REFUSED_BY, Hardware, cluster_of, find_gpu
from ultralong_ray.planner.predict import Prediction, kernel_of, predict_work
from ultralong_ray.planner.refuse import no_degrees, refusal
from ultralong_ray.planner.section import Section, section_of
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

UNPREDICTED_MLP_TILE, UNPREDICTED_LOSS_TILE = 16_384, 2_048


@dataclass(frozen=True, slots=True)
class Planned:
    """`prediction` is None where no speeds are known: on CPUs, on an unknown GPU, with an untimed kernel."""

    section: Section
    plan: TrainPlan
    prediction: Prediction | None
    notes: tuple[str, ...]  # why not better, what was assumed


def plan_training(
    recipe: Recipe, name: Literal["pretrain", "sft"], hardware: Hardware | None, shape: ModelShape | None = None
) -> Planned:
    """The layout of section `name` on `hardware`, or on the recipe's own workers where that is None.

    Given fields are kept; what is "auto" is chosen. Raises PlanRefused, a UserError, when nothing fits.
    """
    section = section_of(recipe, name, shape)
    workers = hardware.num_gpus if hardware is not None else recipe.cluster.num_workers
    if hardware is None:
        gpu = recipe.cluster.gpu
        unknown = "the GPU is not known here" if gpu is None else f"cluster.gpu {gpu!r} is not in the planner's table"
        note = f"{unknown}, so nothing is predicted: give cluster.gpu ({', '.join(GPUS)})"
        notes = (note,) if recipe.cluster.gpus_per_worker else ()
        return Planned(section, _unpredicted(section, workers), None, notes)
    _check_kernel(section, hardware)
    if kernel_of(section.train.attention, hardware) is None:
        note = f'no speed is known for {name}.attention = "{section.train.attention}": nothing is predicted'
        return Planned(section, _unpredicted(section, workers), None, (note,))
    best = fastest(section, hardware)
    if best is None:
        raise refusal(section, hardware)
    best = _with_snapshot(section, best)
    return Planned(section, best.work.plan, best, (*_why(section, best), *_assumed(section, best)))


def _check_kernel(section: Section, hardware: Hardware) -> None:
    """Raises UserError for a given kernel that does not run on the GPU."""
    attention, gpu = section.train.attention, hardware.gpu.name
    if gpu in GPUS_REFUSED_BY.get(attention, ()):
        raise UserError(f'{section.name}.attention = "{attention}" does not run on cluster.gpu {gpu}; give "auto"')


def hardware_of(recipe: Recipe, gpu_name: str | None = None, host_memory_gib: float | None = None) -> Hardware | None:
    """The cluster that [cluster] describes; what was found on it counts where the recipe is silent.

    None on CPUs and where the GPU is not in the table.
    """
    cluster = recipe.cluster
    name = cluster.gpu or gpu_name
    if not cluster.gpus_per_worker or name is None or find_gpu(name) is None:
        return None
    return cluster_of(
        name,
        cluster.num_workers,
        cluster.gpus_per_node,
        cluster.host_memory_gib_per_node or host_memory_gib,
        cluster.network_gbytes_per_second,
    )


def _unpredicted(section: Section, workers: int) -> TrainPlan:
    """All kept where it is computed, the largest group: what needs no knowledge of the device."""
    train, pairs = section.train, legal(section, workers)
    if not pairs:
        raise UserError(f"{section.name}: {no_degrees(section, workers)}")
    rows = 1.0 if train.keep_attention_rows == "auto" else train.keep_attention_rows
    return TrainPlan(
        *pairs[0],
        keep=keep_policy(section, section.shape.layers, rows) if train.gradient_checkpointing else (),
        mlp_tile_tokens=UNPREDICTED_MLP_TILE if train.mlp_tile_tokens == "auto" else train.mlp_tile_tokens,
        loss_tile_tokens=UNPREDICTED_LOSS_TILE if train.loss_tile_tokens == "auto" else train.loss_tile_tokens,
        offload_optimizer=train.offload_optimizer is True,
        checkpoint_snapshot="memory" if train.checkpoint_snapshot == "auto" else train.checkpoint_snapshot,
    )


def _with_snapshot(section: Section, best: Prediction) -> Prediction:
    """Checkpoints are copied into host memory where what training keeps there leaves room for it."""
    roomy = predict_work(replace(best.work, plan=replace(best.work.plan, checkpoint_snapshot="memory")))
    return roomy if section.train.checkpoint_snapshot == "auto" and roomy.fits else best


def _why(section: Section, best: Prediction) -> list[str]:
    """For each thing given up, what having it would have taken; then the other degrees."""
    plan = best.work.plan
    notes = []
    on_host = sum(layer != LayerKeep(attention_rows=layer.attention_rows) for layer in plan.keep)
    if on_host:
        layers = section.shape.layers
        device = _with(best, tuple(LayerKeep(attention_rows=layer.attention_rows) for layer in plan.keep))
        notes.append(
            f"{on_host} of {layers} layers wait on the host: all on the GPU would take {device.memory.gib:.1f} GiB of "
            f"{best.work.device_usable_gib:.1f} usable"
        )
    if plan.keep and plan.keep[0].attention_rows < 1:
        rows = plan.keep[0].attention_rows + 1 / ROW_STEPS
        more = _with(best, keep_policy(section, section.shape.layers - on_host, min(rows, 1.0)))
        notes.append(
            f"{plan.keep[0].attention_rows:.0%} of the attention rows are kept: {min(rows, 1.0):.0%} would take "
            f"{more.memory.gib:.1f} GiB of {best.work.device_usable_gib:.1f} usable on the GPU and "
            f"{more.memory.host_node_gib:,.0f} GiB of {best.work.host_usable_gib:,.0f} usable "
            f"on the host of a node"
        )
    if plan.offload_optimizer and section.train.offload_optimizer == "auto":
        kept = predict_work(replace(best.work, plan=replace(plan, offload_optimizer=False)))
        notes.append(f"the optimizer is offloaded: on the GPU this layout would take {kept.memory.gib:.1f} GiB")
    if plan.checkpoint_snapshot != "memory" and section.train.checkpoint_snapshot == "auto":
        roomy = predict_work(replace(best.work, plan=replace(plan, checkpoint_snapshot="memory")))
        notes.append(
            f"training waits while a checkpoint is written ({plan.checkpoint_snapshot}): a copy in host memory would "
            f"take {roomy.memory.host_node_gib:,.0f} GiB of {best.work.host_usable_gib:,.0f} usable on a node"
        )
    others = _other_degrees(section, best)
    return [*notes, f"other degrees: {'; '.join(others)}"] if others else notes


def _with(best: Prediction, keep: tuple[LayerKeep, ...]) -> Prediction:
    return predict_work(replace(best.work, plan=replace(best.work.plan, keep=keep)))


def _other_degrees(section: Section, best: Prediction) -> list[str]:
    words = []
    for pair in legal(section, best.work.hardware.num_gpus):
        if pair == (best.work.plan.ulysses_degree, best.work.plan.ring_degree):
            continue
        other = fit(section, best.work.hardware, pair, best.work.plan.offload_optimizer)
        words.append(f"{pair[0]} x {pair[1]} " + ("does not fit" if other is None else f"{other.step_seconds:.1f} s"))
    return words


def _assumed(section: Section, best: Prediction) -> list[str]:
    gpu, notes = best.work.hardware.gpu, []
    if section.train.precision == "float32":
        notes.append(
            f'{section.name}.precision = "float32": memory is counted so; speeds are of bfloat16 kernels, which do '
            f"not take float32, so a step lasts much longer than is said"
        )
    elif section.train.attention == "auto":
        notes.append(f"attention kernel {best.work.kernel} is assumed")
    if not gpu.measured:
        notes.append(f"attention and matrix speeds of {gpu.name} are derived from its peak, not measured")
    if section.train.mask_documents:
        notes.append("documents are masked, which costs less attention than the plain causal count here")
    return notes


def as_json(planned: Planned) -> dict[str, Any]:
    """The plan and its prediction as JSON-ready values; what `plan.json` in a stage's directory holds."""
    values: dict[str, Any] = {
        "section": planned.section.name,
        "sequence_length": planned.section.sequence_length,
        "plan": dataclasses.asdict(planned.plan),
        "notes": list(planned.notes),
        "prediction": None,
    }
    prediction = planned.prediction
    if prediction is not None:
        memory = prediction.memory
        values["prediction"] = {
            "cluster": str(prediction.work.hardware),
            "kernel": prediction.work.kernel,
            "rows_per_rank": prediction.work.rows,
            "data_parallel": prediction.work.data_parallel,
            "accumulation": prediction.work.accumulation,
            "device_gib": memory.gib,
            "device_allocated_gib": memory.allocated_gib,
            "device_peak_at": memory.peak[0],
            "device_parts_gib": {**memory.peak[1], **memory.outside},
            "host_rank_gib": memory.host_gib,
            "host_node_gib": memory.host_node_gib,
            "host_parts_gib": memory.host,
            "step_seconds": prediction.step_seconds,
            "step_parts_seconds": prediction.time,
            "tokens_per_second": prediction.tokens_per_second,
            "mfu_causal": prediction.mfu,
            **dataclasses.asdict(prediction.flops),
        }
    return values
