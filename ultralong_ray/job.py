"""What every script in `jobs/` shares: read the recipe, run one stage (or print the plan), say where the result is.

    python jobs/<stage>.py RECIPE.toml [--dry-run] [--section.key value ...]

Exit status: 0 done (or already done), 2 a mistake that the message explains, 130 / 143 stopped by Ctrl-C / SIGTERM
(`ray job stop`); whatever was finished is kept and the next submission continues.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from ultralong_ray.config import ModelConfig, Recipe
from ultralong_ray.plan import check_base_model, describe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import require_inputs, stage_directory, stage_of_model, stages
from ultralong_ray.storage import Location, StageDirectory, refusals_in_words
from ultralong_ray.types import UserError

log = logging.getLogger("ultralong_ray")

Action = Callable[..., Any]  # (recipe, its path, overrides), and the words of a `Several` flag where one is taken

_terminated: list[int] = []  # the SIGTERMs received


@dataclass(frozen=True, slots=True)
class Only:
    """A flag that does something instead of running a stage."""

    flag: str
    help: str
    action: Action


@dataclass(frozen=True, slots=True)
class Several:
    """A flag that may be repeated; the action gets its words. `most`: "+" takes all words up to the next flag."""

    flag: str
    word: str
    help: str
    most: Literal[1, "+"] = 1


RESUME_ANYWAY = Several(
    "--resume-anyway",
    "FIELD",
    "continue from a checkpoint that differs in this field, named as the refusal names it; may be repeated",
)


def run_stages(*names: str) -> None:
    """Entry point of a stage's script: run the named stages that the recipe has and that are not done.

    The script of `prepare` also takes --plan-only, those of training stages --preflight-only and --resume-anyway.
    """

    def each(run: Callable[..., Any]) -> Action:
        def action(recipe: Recipe, path: str, overrides: list[str], *more: Any) -> None:
            there = [name for name in names if name in stages(recipe)]
            if not there:
                log.info("the recipe has no [%s] section: nothing to do", names[0])
            for name in there:
                run(recipe, name, shlex.join([path, *overrides]), *more)

        return action

    only, trains = None, set(names) <= {"pretrain", "sft"}
    if "prepare" in names:
        only = Only("--plan-only", "measure and plan, print the plan and stop", lambda recipe, *_: plan_prepare(recipe))
    elif trains:
        check = each(preflight_stage)
        only = Only("--preflight-only", "check the machine for this run and stop", lambda *given: check(*given[:3]))
    guarded(each(run_stage), only, RESUME_ANYWAY if trains else None)


def plan_prepare(recipe: Recipe) -> None:
    """Measure the corpus, plan the packing, print the plan and where it is written."""
    from ultralong_ray.data.pipeline import plan_only

    directory = stage_directory(recipe, "prepare")
    connect_to_ray()
    await_nodes(recipe, "prepare")
    print(f"{plan_only(recipe, directory)}\nplan: {directory.location}/plan.json")


def guarded(
    action: Action,
    only: Only | None = None,
    several: Several | None = None,
    describe_more: Callable[..., str] | None = None,
) -> None:
    """Parse the command line, run `action(recipe, recipe_path, overrides)`, turn mistakes into messages.

    With `only` the script takes its flag as well, which runs its action instead. With `several` it takes that
    flag, whose words both actions get as a fourth argument: a tuple, empty where the flag is not given. With
    `describe_more` a dry run prints what that says of the recipe, and of these words, as well.
    """
    parser = argparse.ArgumentParser(
        description="Runs one part of a recipe. Any key of the recipe can be overridden: --pretrain.learning_rate 1e-5",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="TOML file, for example jobs/recipes/quickstart.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    if only is not None:
        parser.add_argument(only.flag, action="store_true", dest="only", help=only.help)
    if several is not None:
        kind = {"metavar": several.word, "nargs": several.most, "help": several.help}
        parser.add_argument(several.flag, action="extend", default=[], dest="several", **kind)
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with refusals_in_words():
            recipe = load_recipe(arguments.recipe, overrides)
            check_base_model(recipe)
            more = () if several is None else (tuple(arguments.several),)
            if arguments.dry_run:
                print(describe(recipe))
                if describe_more is not None:
                    print(f"\n{describe_more(recipe, *more)}")
            else:
                chosen = only.action if only is not None and arguments.only else action
                chosen(recipe, arguments.recipe, overrides, *more)
    except UserError as error:
        _leave(2, f"error: {error}")
    except KeyboardInterrupt:
        status, cause = (143, "SIGTERM") if _terminated else (130, "Ctrl-C")
        _leave(status, f"stopped by {cause}; finished stages and checkpoints are kept, submit again to continue")


def _stop(signum: int, frame: FrameType | None) -> None:
    """SIGTERM as an interrupt: the only exception that a waiting ray.get lets out of a signal handler (Ray 2.60)."""
    _terminated.append(signum)
    raise KeyboardInterrupt


def _leave(status: int, message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def run_stage(
    recipe: Recipe,
    stage: str,
    recipe_path: str,
    resume_anyway: tuple[str, ...] = (),
    callbacks: tuple[Any, ...] = (),
) -> StageDirectory:
    """Compute a stage unless it is done, and record its summary last. `callbacks`: of Ray Train, see `train`."""
    directory = stage_directory(recipe, stage)
    if directory.settled:
        log.info("%s is done already: %s", stage, directory.location)
        return directory
    require_inputs(recipe, stage, recipe_path)
    connect_to_ray()
    await_nodes(recipe, stage)
    log.info("%s starts: %s", stage, directory.location)
    began = time.monotonic()
    summary = compute(recipe, stage, directory, resume_anyway, callbacks)
    (directory.location / "recipe.json").write_json(recipe.model_dump(mode="json"))
    times = {"seconds": round(time.monotonic() - began, 1), "ended": round(time.time(), 1)}
    directory.mark_done({**summary, **times})
    log.info("%s is done in %.0f s: %s", stage, time.monotonic() - began, directory.location)
    return directory


def preflight_stage(recipe: Recipe, stage: str, recipe_path: str) -> None:
    """Check the machine for a training stage; nothing is trained and nothing is recorded."""
    require_inputs(recipe, stage, recipe_path)
    connect_to_ray()
    await_nodes(recipe, stage)
    _train(recipe, stage, stage_directory(recipe, stage), preflight_only=True)
    log.info("preflight of %s: all checks passed", stage)


def connect_to_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (set inside a Ray job), else the one running here, else start one.

    Raises: UserError where that cluster cannot be joined, as one of another Python.
    """
    import ray
    from ray.exceptions import AuthenticationError

    from ultralong_ray.nodes import silent_head

    if ray.is_initialized():
        return
    # The workers import this package from the submitted working directory or from site-packages; when a script is
    # run directly from a clone that is not installed, they need to be told where it is.
    package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    workers_env = {"env_vars": {"PYTHONPATH": python_path}}
    try:
        if head := silent_head():
            raise ConnectionError(f"nothing listens at {head}; `ray stop` forgets a cluster of this machine that died")
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=workers_env)
    # Ray 2.60: another Python, nothing there, no address, no token
    except (RuntimeError, ConnectionError, ValueError, AuthenticationError) as error:
        where = os.environ.get("RAY_ADDRESS", "the cluster that runs here")
        raise UserError(
            f"Ray cannot be joined (RAY_ADDRESS: {where}): {error}\nSet RAY_ADDRESS to another cluster; "
            "RAY_ADDRESS=local starts one for this command alone"
        ) from error
    signal.signal(signal.SIGTERM, _stop)  # ray.init has put its own handler there


def await_nodes(recipe: Recipe, stage: str) -> None:
    """Return when the cluster has what `stage` cannot start without; UserError when that takes too long."""
    from ultralong_ray.nodes import wait_for_nodes

    wait_for_nodes(recipe, stage)


def compute(
    recipe: Recipe,
    stage: str,
    directory: StageDirectory,
    resume_anyway: tuple[str, ...] = (),
    callbacks: tuple[Any, ...] = (),
) -> dict[str, Any]:
    """Call the room that computes `stage`. Imports are local: a stage loads only what it needs."""
    if stage == "prepare":
        from ultralong_ray.data.pipeline import prepare

        return prepare(recipe, directory)
    if stage == "prepare_sft":
        from ultralong_ray.data.pipeline import prepare_sft

        return prepare_sft(recipe, directory)
    if stage == "extend":
        from ultralong_ray.model.extend import extend

        return extend(recipe, directory)
    if stage in ("pretrain", "sft"):
        return _train(recipe, stage, directory, resume_anyway=resume_anyway, callbacks=callbacks)
    if stage == "export":
        from ultralong_ray.export import export

        return export(recipe, _trained_model(recipe), directory, _provenance(recipe))
    if stage == "evaluate":
        return _evaluate(recipe, directory)
    from ultralong_ray.report.page import write_report

    finished = {name: stage_directory(recipe, name) for name in stages(recipe) if name != "report"}
    return write_report(recipe, finished, directory)


def _output(recipe: Recipe, stage: str) -> Location:
    return stage_directory(recipe, stage).location


def _train(
    recipe: Recipe,
    stage: str,
    directory: StageDirectory,
    preflight_only: bool = False,
    resume_anyway: tuple[str, ...] = (),
    callbacks: tuple[Any, ...] = (),
) -> dict[str, Any]:
    from ultralong_ray.train.trainer import train

    if stage == "pretrain":
        packed, model = _output(recipe, "prepare"), _output(recipe, "extend") / "model"
        return train(recipe, "pretrain", packed, model, directory, preflight_only, resume_anyway, callbacks)
    packed, model = _output(recipe, "prepare_sft"), _output(recipe, "pretrain") / "model"
    return train(recipe, "sft", packed, model, directory, preflight_only, resume_anyway, callbacks)


def _trained_model(recipe: Recipe) -> Location:
    return _output(recipe, "sft" if recipe.sft is not None else "pretrain") / "model"


def _provenance(recipe: Recipe) -> dict[str, Any]:
    """Summaries of the stages that led to the exported model, for its card."""
    names = [name for name in ("prepare", "prepare_sft", "pretrain", "sft") if name in stages(recipe)]
    return {name: stage_directory(recipe, name).summary() for name in names}


def _evaluate(recipe: Recipe, directory: StageDirectory) -> dict[str, Any]:
    from ultralong_ray.eval.fanout import evaluate

    assert recipe.evaluate is not None
    models: dict[str, Location | ModelConfig] = {}
    for name in recipe.evaluate.models:
        stage = stage_of_model(recipe, name)
        models[name] = recipe.model if stage == "base" else _output(recipe, stage) / "model"
    holdout = _output(recipe, "prepare") / "holdout.parquet"
    return evaluate(recipe, models, holdout if holdout.exists() else None, directory)
