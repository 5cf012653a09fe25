"""What a training worker is told, and the checks that cost a second on the driver instead of a start of the cluster."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ultralong_ray.config import Recipe, TrainConfig
from ultralong_ray.config.degrees import model_heads, refuse_batch
from ultralong_ray.packed import PackedManifest
from ultralong_ray.storage import Location
from ultralong_ray.train.patience import FIRST_STEP_FACTOR, LEAST_FIRST_STEP_SECONDS
from ultralong_ray.types import TrainPlan, UserError


def error_file(stage: Location, driver: str) -> Location:
    """Here stands what the user must mend, written by a rank or by what counts breakdowns.

    Ray would restart the ranks as after a crash; restarted ones see the file and leave at once. It is the submission's
    own, as is `stop_file`: another that trains the same stage must not leave for it.
    """
    return stage / f"train_error-{driver}.txt"


def stop_file(stage: Location, driver: str) -> Location:
    """By this the driver asks its ranks to save and leave."""
    return stage / f"stop_requested-{driver}"


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Everything a worker must be told."""

    recipe: Recipe
    section: Literal["pretrain", "sft"]
    packed: Location  # packed sequences
    model: Location  # Hugging Face folder to start from
    stage: Location  # the stage's directory
    fingerprint: str
    plan: TrainPlan  # degrees, what layers keep, tiles, offload
    preflight_only: bool = False  # build the model, run the checks, take no step
    resume_anyway: tuple[str, ...] = ()  # fields in which a checkpoint may differ from this run
    plans: dict[int, TrainPlan] = field(default_factory=dict)  # by number of workers, where that may change
    longest_step_seconds: float = LEAST_FIRST_STEP_SECONDS  # of a healthy run without hang_timeout_seconds
    driver: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # the submission's id

    def for_world(self, num_workers: int) -> TrainJob:
        """The job as so many workers do it."""
        return replace(self, plan=self.plans.get(num_workers, self.plan))

    @property
    def train(self) -> TrainConfig:
        section = self.recipe.pretrain if self.section == "pretrain" else self.recipe.sft
        if section is None:
            raise UserError(f"the recipe has no [{self.section}] section")
        return section

    def num_steps(self, num_sequences: int) -> int:
        return self.train.steps or num_sequences // self.train.global_batch_sequences

    @property
    def error_file(self) -> Location:
        return error_file(self.stage, self.driver)

    @property
    def stop_file(self) -> Location:
        return stop_file(self.stage, self.driver)

    @property
    def first_step_seconds(self) -> float:
        """What the first step of an attempt may take."""
        given = self.train.hang_timeout_seconds
        return self.longest_step_seconds if given is None else FIRST_STEP_FACTOR * given

    @property
    def random_seed(self) -> int | None:
        """SFT starts from what pretraining made, so only pretraining draws weights."""
        return self.train.seed if self.section == "pretrain" and self.recipe.model.init == "random" else None


def check_inputs(job: TrainJob) -> None:
    """Raise UserError when model, packed sequences and recipe do not fit each other. Reads two small files."""
    shape: dict[str, Any] = (job.model / "config.json").read_json()
    manifest = PackedManifest.read(job.packed)
    name, train = job.section, job.train
    length = manifest.sequence_length
    try:
        job.recipe.degrees(train, model_heads(shape), length)
        groups = job.recipe.cluster.num_workers // job.plan.degree
        refuse_batch(name, train.global_batch_sequences, train.micro_batch_sequences, groups)
    except ValueError as error:
        raise UserError(f"{error} ({job.model} on {job.packed})") from None
    if manifest.vocab_size > shape["vocab_size"]:
        raise UserError(
            f"{job.packed} was tokenised with {manifest.vocab_size} ids, {job.model} embeds {shape['vocab_size']}; "
            f"prepare the corpus with the tokenizer of this model"
        )
    if length > shape.get("max_position_embeddings", length):
        raise UserError(
            f"{job.packed}: sequences of {length} tokens are beyond the window of {job.model}, "
            f"max_position_embeddings {shape['max_position_embeddings']}; extend the model first"
        )
    if manifest.num_sequences < train.global_batch_sequences:
        raise UserError(
            f"{job.packed} holds {manifest.num_sequences} sequences, one step takes {name}.global_batch_sequences "
            f"{train.global_batch_sequences}; prepare more tokens or lower it"
        )
