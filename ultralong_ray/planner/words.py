"""A plan as a person reads it: degrees, what waits where, memory and time with their parts, the whole run's hours."""

from __future__ import annotations

from ultralong_ray.config import TrainConfig
from ultralong_ray.planner.plan import Planned
from ultralong_ray.planner.predict import Prediction
from ultralong_ray.types import LayerKeep, TrainPlan

SECONDS_PER_HOUR = 3600


def keep_words(keep: tuple[LayerKeep, ...]) -> str:
    """Where the layers' kept tensors wait, equal neighbours together."""
    if not keep:
        return "autograd keeps everything on the device"
    runs: list[tuple[int, int, LayerKeep]] = []
    for index, layer in enumerate(keep):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], index, layer)
        else:
            runs.append((index, index, layer))
    return "; ".join(f"layers {first}-{last} {_layer_words(layer)}" for first, last, layer in runs)


def _layer_words(layer: LayerKeep) -> str:
    if layer.attention_rows == 0:
        return f"inputs on the {layer.inputs}, attention computed again"
    rows = "" if layer.attention_rows == 1 else f" (last {layer.attention_rows:.4g} of the rows)"
    if layer.inputs == layer.attention:
        return f"inputs and attention{rows} on the {layer.inputs}"
    return f"inputs on the {layer.inputs}, attention{rows} on the {layer.attention}"


def plan_words(plan: TrainPlan) -> str:
    """The layout in a line or two."""
    optimizer = "host" if plan.offload_optimizer else "device"
    return (
        f"Ulysses {plan.ulysses_degree} x ring {plan.ring_degree}, optimizer on the {optimizer}, tiles of "
        f"{plan.mlp_tile_tokens:,} (MLP) and {plan.loss_tile_tokens:,} (loss) rows; {keep_words(plan.keep)}"
    )


def warmup_words(section: str, train: TrainConfig, num_steps: int) -> str | None:
    """Where the warm-up is longer than the run, so that no step has the full learning rate; else None."""
    if train.warmup_steps <= num_steps:
        return None
    last = train.learning_rate * num_steps / train.warmup_steps
    return (
        f"{section}.warmup_steps {train.warmup_steps:,} is more than the {num_steps:,} steps: the learning rate ends "
        f"at {last:.3g}, short of {section}.learning_rate {train.learning_rate:g}; lower warmup_steps to reach it"
    )


def summary(prediction: Prediction) -> str:
    """Memory, time and speed in a line."""
    memory = prediction.memory
    return (
        f"{memory.gib:.1f} GiB per GPU, {memory.host_node_gib:,.0f} GiB of host memory per node, "
        f"{prediction.step_seconds:.1f} s per step, MFU {prediction.mfu:.1%} (causal model FLOPs)"
    )


def describe_plan(planned: Planned, num_steps: int | None) -> str:
    """The table of one training stage. `num_steps`: of the recipe, None where the data decides."""
    section, prediction = planned.section, planned.prediction
    lines = [f"{section.name}: {section.sequence_length:,} tokens, batch {section.train.global_batch_sequences}"]
    if prediction is None:
        lines.append(f"  layout      {plan_words(planned.plan)}")
    else:
        lines += _layout_lines(planned, prediction)
        lines += _memory_lines(prediction)
        lines += _time_lines(prediction)
        lines += _total_lines(prediction, num_steps)
    return "\n".join([*lines, *(f"  note        {note}" for note in planned.notes)])


def _layout_lines(planned: Planned, prediction: Prediction) -> list[str]:
    work, plan = prediction.work, planned.plan
    given = ", ".join(planned.section.given) or "nothing"
    return [
        f"  cluster     {work.hardware}",
        f"  degrees     Ulysses {plan.ulysses_degree} x ring {plan.ring_degree} x data-parallel {work.data_parallel}, "
        f"accumulation {work.accumulation}; {work.rows:,} rows per GPU and pass; kernel {work.kernel}",
        f"  kept        {keep_words(plan.keep)}",
        f"  tiles       MLP {plan.mlp_tile_tokens:,} rows, loss {plan.loss_tile_tokens:,} rows; optimizer on the "
        f"{'host' if plan.offload_optimizer else 'GPU'}",
        f"  given       {given}",
    ]


def _memory_lines(prediction: Prediction) -> list[str]:
    memory = prediction.memory
    moment, parts = memory.peak
    usable = prediction.work.host_usable_gib
    return [
        f"  GPU memory  {memory.gib:.1f} GiB per rank of {prediction.work.device_usable_gib:.1f} usable, highest at: "
        f"{moment}; torch allocates {memory.allocated_gib:.1f}",
        *_table({**parts, **memory.outside}, "GiB", 1),
        f"  host        {memory.host_gib:.1f} GiB per rank; a node {memory.host_node_gib:,.0f} of {usable:,.0f} usable",
        *_table(memory.host, "GiB", 1),
    ]


def _time_lines(prediction: Prediction) -> list[str]:
    return [
        f"  step        {prediction.step_seconds:.1f} s",
        *_table(prediction.time, "s", 2),
    ]


def _total_lines(prediction: Prediction, num_steps: int | None) -> list[str]:
    gpus, flops = prediction.work.hardware.num_gpus, prediction.flops
    lines = [
        f"  speed       {prediction.tokens_per_second:,.0f} tokens/s, {prediction.tokens_per_second / gpus:,.0f} per "
        f"GPU; MFU {prediction.mfu:.1%} in causal model FLOPs",
        f"  FLOPs       of a step: model, causal {flops.model_flops_causal:.3e}; hardware {flops.hardware_flops:.3e}; "
        f"ALST-style {flops.alst_flops:.3e}",
    ]
    if num_steps is not None:
        hours = num_steps * prediction.step_seconds / SECONDS_PER_HOUR
        lines.append(f"  whole run   {num_steps:,} steps: {hours:,.1f} hours, {hours * gpus:,.0f} GPU-hours")
    return lines


def _table(parts: dict[str, float], unit: str, digits: int) -> list[str]:
    """Parts, the largest first, those that round to nothing left out."""
    shown = [(name, value) for name, value in parts.items() if round(value, digits) > 0]
    return [f"    {name:<30}{value:>10,.{digits}f} {unit}" for name, value in sorted(shown, key=lambda part: -part[1])]
