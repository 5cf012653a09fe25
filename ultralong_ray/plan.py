"""What a recipe will do, in words and numbers, before anything starts: `--dry-run` of every job prints this."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ultralong_ray.config import Recipe, TrainConfig
from ultralong_ray.config.degrees import Heads
from ultralong_ray.config.made_tasks import ShortSkillsTask
from ultralong_ray.config.read_tasks import StandardTask
from ultralong_ray.flops import ModelShape
from ultralong_ray.model.extend import check_written
from ultralong_ray.model.folder import read_config
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.planner.plan import Planned, hardware_of, plan_training
from ultralong_ray.planner.words import plan_words, summary, warmup_words
from ultralong_ray.stages import inputs, stage_directory, stages
from ultralong_ray.storage import Location, refusals_in_words
from ultralong_ray.types import UserError


def num_steps(train: TrainConfig, num_sequences: int) -> int:
    """Optimizer steps: as given, else one epoch over `num_sequences` (at least one step)."""
    return train.steps or max(1, num_sequences // train.global_batch_sequences)


def num_steps_known(recipe: Recipe, section: str) -> int | None:
    """Optimizer steps of a training section; None where the data decides."""
    train = next(train for name, train, _ in recipe.train_stages() if name == section)
    return num_steps(train, recipe.prepare.num_sequences) if section == "pretrain" else train.steps


def model_shape(recipe: Recipe) -> ModelShape | None:
    """From [model.architecture], or config.json where the base model lies on this disk.

    Raises UserError for a config.json that describes no Llama-class model.
    """
    if recipe.model.architecture is not None:
        return ModelShape.from_architecture(recipe.model.architecture)
    file = Location.of(recipe.model.base) / "config.json"
    if not file.is_local or not file.exists():
        return None
    try:
        return ModelShape.from_config(file.read_json())
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"model.base: {file} describes no Llama-class model ({type(error).__name__}: {error}); fetch the model "
            f"again, or name another folder"
        ) from None


def plan_stages(recipe: Recipe, hardware: Hardware | None = None) -> list[Planned | UserError]:
    """Layout and prediction, or refusal, of every training stage; on the recipe's own [cluster] by default."""
    outcomes: list[Planned | UserError] = []
    sized = recipe.at_largest_size()
    where, shape = hardware or hardware_of(sized), model_shape(sized)
    for name, _, _ in sized.train_stages():
        try:
            outcomes.append(plan_training(sized, "sft" if name == "sft" else "pretrain", where, shape))
        except UserError as error:
            outcomes.append(error)
    return outcomes


def check_base_model(recipe: Recipe) -> None:
    """Refuse a base model that cannot be extended as the recipe asks, and degrees that its heads cannot take, where its
    config.json lies on this disk.

    (Without [model.architecture] the recipe alone does not know the heads.) Raises UserError.
    """
    sized, heads = recipe.at_largest_size(), _heads(recipe)
    folder = Location.of(recipe.model.base)
    if recipe.model.init == "pretrained" and folder.is_local and (folder / "config.json").exists():
        check_written(recipe.model, Path(folder.path), read_config(Path(folder.path)))
    for _, train, _ in sized.train_stages():
        try:
            sized.degrees(train, heads)
        except ValueError as error:
            raise UserError(str(error)) from None


def _heads(recipe: Recipe) -> Heads | None:
    """(query, key-value) heads as far as they can be known without a download."""
    shape = model_shape(recipe)
    return None if shape is None else (shape.heads, shape.kv_heads)


def describe(recipe: Recipe) -> str:
    """The resolved plan: window, RoPE, tokens, sequences, steps, degrees, paths and what is already done."""
    lines = [f"recipe {recipe.name}", *_model_lines(recipe), *_prepare_lines(recipe)]
    sized = recipe.at_largest_size()
    for (name, train, length), outcome in zip(sized.train_stages(), plan_stages(recipe), strict=True):
        lines += _train_lines(sized, name, train, length, outcome)
    return "\n".join([*lines, *_evaluate_lines(recipe), *_stage_lines(recipe)])


def _stage_lines(recipe: Recipe) -> list[str]:
    """Where each stage writes. A workdir that cannot be reached from here neither spoils nor delays a dry run."""
    directories = [stage_directory(recipe, stage) for stage in stages(recipe)]
    try:
        with refusals_in_words():
            asked = [replace(directory, location=directory.location.asked_once) for directory in directories]
            states = ["done" if directory.done else "to do" for directory in asked]
        note = []
    except (UserError, OSError) as error:
        states = ["?" for _ in directories]
        note = [f"  (what is done already is not known from here: {error})"]
    lines = ["", "stages, in order:", *note]
    for directory, state in zip(directories, states, strict=True):
        reads = ", ".join(inputs(recipe, directory.stage))
        lines.append(
            f"  {directory.stage:<12} {state:<6} {directory.location}" + (f"  (reads {reads})" if reads else "")
        )
    return lines


def _model_lines(recipe: Recipe) -> list[str]:
    model = recipe.model
    rope = model.rope
    lines = [
        "",
        f"model       {model.base}" + (" (random weights)" if model.init == "random" else ""),
        f"  window    {model.base_context_length:,} -> {model.target_context_length:,} tokens, "
        f"max_position_embeddings {model.exported_max_position_embeddings:,}",
        f"  rope      {rope.scheme}, factor s = {rope.factor:g} over the original {model.original_context_length:,} "
        f"tokens, alpha {rope.low_freq_factor:g}, beta {rope.high_freq_factor:g}",
    ]
    if rope.scheme != "none" and rope.factor * model.original_context_length < model.target_context_length:
        reach = int(rope.factor * model.original_context_length)
        lines.append(
            f"  note      factor x original length reaches {reach:,} tokens, short of the target; "
            f"model.rope.factor = {model.target_context_length / model.original_context_length:g} would cover it"
        )
    return lines


def _prepare_lines(recipe: Recipe) -> list[str]:
    prepare = recipe.prepare
    tokens = prepare.num_sequences * prepare.sequence_length
    sources = ", ".join(source.uri or source.kind for source in recipe.corpus.sources)
    encoding = f" as {prepare.separator_encoding}" if prepare.separator == "<s>" else ""
    mask = "attention masked at document boundaries" if recipe.pretrain.mask_documents else "no cross-document mask"
    return [
        "",
        f"prepare     {sources}",
        f"  tokens    budget {prepare.token_budget:,} ({prepare.token_budget / 1e9:.3g}B): {prepare.num_sequences:,} "
        f"sequences of {prepare.sequence_length:,} = {tokens:,}",
        f"  lengths   < {prepare.short_below_tokens:,} tokens: {prepare.short_keep:.0%} kept; "
        f"> {prepare.long_above_tokens:,}: {prepare.long_repeat} copies, at most {prepare.max_repeats}",
        f"  separator {prepare.separator!r}{encoding}, {mask}",
    ]


def _train_lines(recipe: Recipe, name: str, train: TrainConfig, length: int, outcome: Planned | UserError) -> list[str]:
    if isinstance(outcome, UserError):
        ulysses, ring = recipe.degrees(train, _heads(recipe))
    else:
        ulysses, ring = outcome.plan.ulysses_degree, outcome.plan.ring_degree
    workers = recipe.cluster.num_workers
    groups = workers // (ulysses * ring)
    accumulation = train.global_batch_sequences // (groups * train.micro_batch_sequences)
    known = recipe.prepare.num_sequences if name == "pretrain" else None
    steps = train.steps if known is None else num_steps(train, known)
    step_tokens = train.global_batch_sequences * length
    lines = [
        "",
        f"{name:<11} learning rate {train.learning_rate:g}, {train.schedule}, warmup {train.warmup_steps} steps",
    ]
    if steps is None:
        lines.append(f"  steps     one epoch over the packed samples, batch {train.global_batch_sequences} sequences")
    else:
        total = steps * step_tokens
        epochs = f", {steps * train.global_batch_sequences / known:.2f} epochs" if known else ""
        lines.append(
            f"  steps     {steps:,} iterations x batch {train.global_batch_sequences} x {length:,} tokens = "
            f"{total:,} tokens ({total / 1e9:.3g}B){epochs}"
        )
        note = warmup_words(name, train, steps)
        lines += [f"  note      {note}"] if note else []
    lines.append(
        f"  degrees   {workers} workers = {groups} data-parallel x {ulysses} Ulysses x {ring} ring, ZeRO-"
        f"{train.zero_stage}; {length // (ulysses * ring):,} tokens of a sequence per worker; micro-batch "
        f"{train.micro_batch_sequences}, accumulation {accumulation}; {train.precision}"
    )
    return [*lines, *_layout_lines(outcome)]


def _layout_lines(outcome: Planned | UserError) -> list[str]:
    if isinstance(outcome, UserError):
        return [f"  layout    {line}" for line in str(outcome).splitlines()]
    lines = [f"  layout    {plan_words(outcome.plan)}"]
    if outcome.prediction is not None:
        lines.append(f"  predicted {summary(outcome.prediction)}; more: jobs/plan.py")
    return [*lines, *(f"  note      {note}" for note in outcome.notes)]


def _evaluate_lines(recipe: Recipe) -> list[str]:
    evaluate = recipe.evaluate
    if evaluate is None:
        return []
    lines = ["", f"evaluate    models {', '.join(evaluate.models)}"]
    if evaluate.passkey:
        cells = len(evaluate.context_lengths) * len(evaluate.depths_percent)
        lines.append(
            f"  passkey   {len(evaluate.context_lengths)} lengths to {max(evaluate.context_lengths):,} tokens x "
            f"{len(evaluate.depths_percent)} depths x {evaluate.samples_per_cell} samples = {cells} cells"
        )
    for task in evaluate.tasks:
        if isinstance(task, StandardTask):
            rows = f"the first {task.limit} rows of every subject" if task.limit else "all rows"
            lines.append(f"  {task.kind:<9} {', '.join(task.names)}: {rows}")
            continue
        if isinstance(task, ShortSkillsTask):
            lines.append(f"  {task.kind:<9} {', '.join(task.names)}: {task.samples_per_cell} samples")
            continue
        samples = f"{task.samples_per_cell} samples" if task.samples_per_cell else "all rows"
        lines.append(
            f"  {task.kind:<9} {len(task.names_of_tasks())} tasks x {len(task.context_lengths)} lengths to "
            f"{max(task.context_lengths):,} tokens x {len(task.depths())} depths x {samples}"
        )
    return lines
