"""Numbers of workers that a recipe allows, each with its layout: pure planning, no Ray.

Flows in: a recipe with cluster.min_workers. Flows out: {number of workers: TrainPlan} for those from min_workers to
num_workers that fill whole sequence-parallel groups and share the global batch evenly. The batch stays what it is at
every size, and accumulation follows from it, so the losses do too.
"""

from __future__ import annotations

import logging
from typing import Literal

from ultralong_ray.config import Recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.planner.plan import hardware_of, plan_training
from ultralong_ray.types import TrainPlan, UserError

logger = logging.getLogger(__name__)


def plans_by_size(
    recipe: Recipe,
    section: Literal["pretrain", "sft"],
    shape: ModelShape,
    gpu_name: str | None = None,
    host_memory_gib: float | None = None,
) -> dict[int, TrainPlan]:
    """The layouts of a run whose number of workers may change; {} where it may not. Sizes without one are logged.

    Raises UserError where no number of them has a layout.
    """
    least, most = recipe.cluster.min_workers, recipe.cluster.num_workers
    if least is None or least == most:
        return {}
    plans: dict[int, TrainPlan] = {}
    refused: dict[int, str] = {}
    for workers in range(least, most + 1):
        sized = with_workers(recipe, workers)
        try:
            hardware = hardware_of(sized, gpu_name, host_memory_gib)
            plans[workers] = plan_training(sized, section, hardware, shape).plan
        except (UserError, ValueError) as error:
            refused[workers] = str(error).splitlines()[0]
    if not plans:
        raise UserError(
            f"no number of workers from cluster.min_workers {least} to cluster.num_workers {most} will do; with "
            f"{most}: {refused[most]}. Change the range, the degrees or the global batch"
        )
    if refused:
        logger.info("%s can run on %s workers; others stand by", section, ", ".join(map(str, plans)))
    return plans


def with_workers(recipe: Recipe, workers: int) -> Recipe:
    """The recipe as if it asked for so many workers; not checked again."""
    cluster = recipe.cluster.model_copy(update={"num_workers": workers, "min_workers": None})
    return recipe.model_copy(update={"cluster": cluster})
