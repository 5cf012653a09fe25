"""The fastest layout that fits: degrees, what is kept where, tiles, offload. Flows in: a section and a cluster.

Every combination that the section allows is predicted, with one choice inside each made by order instead of search:
keep all on the GPU; if that is too much, move the kept tensors of the first layers to the host (the last ones are
needed first, and soonest); if the host is short as well, keep fewer rows, the same share in every layer, since the
cost of what is dropped grows with its square. Smaller tiles, and last an optimizer on the host, are tried only where
rows would have to go without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeVar

from ultralong_ray.config.degrees import legal_degrees
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.planner.predict import Prediction, kernel_of, predict_work
from ultralong_ray.planner.section import Section
from ultralong_ray.planner.workload import Workload
from ultralong_ray.types import LayerKeep, TrainPlan

TILES = ((16_384, 2_048), (8_192, 1_024), (2_048, 512))  # rows of (MLP, loss), preferred first
ROW_STEPS = 16  # attention_rows is a multiple of 1 / 16
ALIKE = 0.002  # step times within this share of each other are told apart by simplicity instead

Place = Literal["device", "host"]
Choice = TypeVar("Choice")


def fastest(section: Section, hardware: Hardware) -> Prediction | None:
    """The best layout that fits, None where none does."""
    found: list[Prediction] = []
    for offload in _choices(section.train.offload_optimizer, (False, True)):
        pairs = legal(section, hardware.num_gpus)
        found += [best for pair in pairs if (best := fit(section, hardware, pair, offload))]
        if any(_keeps_all(prediction) for prediction in found):
            break
    if not found:
        return None
    limit = min(prediction.step_seconds for prediction in found) * (1 + ALIKE)
    return min((p for p in found if p.step_seconds <= limit), key=_plainness)


def _keeps_all(prediction: Prediction) -> bool:
    """Is no attention computed again? Then neither smaller tiles nor offload can make it faster."""
    return all(layer.attention_rows == 1 for layer in prediction.work.plan.keep)


def _plainness(prediction: Prediction) -> tuple[bool, float, int, int]:
    """The optimizer on the GPU, then less on the host, then less ring, then smaller groups."""
    plan = prediction.work.plan
    return plan.offload_optimizer, prediction.memory.host_gib, plan.ring_degree, plan.degree


def legal(section: Section, num_workers: int) -> list[tuple[int, int]]:
    """(Ulysses, ring) degrees that the cluster, the heads, the length, the batch and the given fields allow.

    Larger groups first, and in a group the larger Ulysses degree. Documents are masked only without a ring.
    """
    train, shape = section.train, section.shape
    pairs = legal_degrees(num_workers, section.sequence_length, shape.heads, shape.kv_heads)
    return [
        (ulysses, ring)
        for ulysses, ring in reversed(pairs)
        if section.degrees_given(ulysses, ring)
        and not (train.mask_documents and ring > 1)
        and train.global_batch_sequences % (num_workers // (ulysses * ring) * train.micro_batch_sequences) == 0
    ]


def fit(section: Section, hardware: Hardware, degrees: tuple[int, int], offload: bool) -> Prediction | None:
    """The fastest layout with these degrees, by the order of the module's docstring."""
    best: Prediction | None = None
    for mlp_tile, loss_tile in _tiles(section):
        plan = TrainPlan(*degrees, (), mlp_tile, loss_tile, offload, section.least_snapshot)
        work = workload(section, hardware, plan)
        prediction = _keep_most(section, work)
        if prediction is not None and (best is None or prediction.step_seconds < best.step_seconds * (1 - ALIKE)):
            best = prediction
        if best is not None and _keeps_all(best):
            break
    return best


def _keep_most(section: Section, work: Workload) -> Prediction | None:
    """The most rows that fit somewhere. Fewer rows never take more, so their number is found by halving."""
    if not section.train.gradient_checkpointing:
        prediction = predict_work(work)
        return prediction if prediction.fits else None

    def kept(rows: float) -> Prediction | None:
        found = most_on_device(section, work, rows)
        return found if found is not None and found.fits else None

    if section.train.keep_attention_rows != "auto":
        return kept(section.train.keep_attention_rows)
    if (whole := kept(1.0)) is not None:
        return whole
    best, least, most = kept(0.0), 0, ROW_STEPS
    while best is not None and most - least > 1:
        middle = (least + most) // 2
        if (found := kept(middle / ROW_STEPS)) is not None:
            best, least = found, middle
        else:
            most = middle
    return best


def workload(section: Section, hardware: Hardware, plan: TrainPlan) -> Workload:
    """The section under a plan, its ZeRO stage and gradients as train/engine.py has DeepSpeed run them.

    The kernel's rates must be known.
    """
    train = section.train
    kernel = kernel_of(train.attention, hardware)
    assert kernel is not None
    half = train.precision == "bfloat16"
    return Workload(
        shape=section.shape,
        sequence_length=section.sequence_length,
        plan=plan,
        hardware=hardware,
        kernel=kernel,
        micro_batch_sequences=train.micro_batch_sequences,
        global_batch_sequences=train.global_batch_sequences,
        zero_stage=max(1, train.zero_stage) if half else train.zero_stage,
        element_bytes=2 if half else 4,
        gradient_bytes=2 if half and train.zero_stage < 2 else 4,
    )


def most_on_device(section: Section, work: Workload, rows: float) -> Prediction | None:
    """With this share of rows: as many of the last layers on the GPU as fit, the rest on the host, full or not.

    Fewer layers on the GPU always means less there and more on the host, so the number is found by halving. None where
    the GPU is too small even with all on the host.
    """

    def with_device_layers(number: int) -> Prediction:
        return predict_work(replace(work, plan=replace(work.plan, keep=keep_policy(section, number, rows))))

    least, most = 0, section.shape.layers
    prediction = with_device_layers(most)
    if prediction.fits_device:
        return prediction
    best = with_device_layers(least)
    if not best.fits_device:
        return None
    while most - least > 1:
        middle = (least + most) // 2
        prediction = with_device_layers(middle)
        if prediction.fits_device:
            best, least = prediction, middle
        else:
            most = middle
    return best


def keep_policy(section: Section, device_layers: int, rows: float) -> tuple[LayerKeep, ...]:
    """The last `device_layers` keep on the GPU, the others on the host, unless a field says where."""
    train = section.train

    def layer(place: Place) -> LayerKeep:
        inputs = place if train.keep_inputs == "auto" else train.keep_inputs
        attention = place if train.keep_attention == "auto" else train.keep_attention
        return LayerKeep(inputs, attention, rows)

    return (layer("host"),) * (section.shape.layers - device_layers) + (layer("device"),) * device_layers


def _tiles(section: Section) -> Iterator[tuple[int, int]]:
    """Pairs of tile sizes, given ones fixed; the same pair is not tried twice."""
    seen = set()
    for mlp, loss in TILES:
        pair = _choices(section.train.mlp_tile_tokens, (mlp,))[0], _choices(section.train.loss_tile_tokens, (loss,))[0]
        if pair not in seen:
            seen.add(pair)
            yield pair


def _choices(field: Choice | Literal["auto"], choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    return choices if field == "auto" else (field,)
