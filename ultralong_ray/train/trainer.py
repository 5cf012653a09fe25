"""The driver's side of training: check, run the loop on Ray workers, join the last checkpoint into a model folder.

Flows in: a recipe, packed sequences, a Hugging Face folder, a stage's directory. Flows out, in that directory:
`plan.json` (how the workers are laid out and what that should cost), `model/` (Hugging Face folder), `metrics.jsonl`,
`tensorboard/`, `events.jsonl`, and `checkpoints/`, from which a stopped run continues when it is submitted again, on
as many workers as there are then. `ray/` is Ray's own folder; checkpoints do not pass through it, since Ray keeps or
drops them by count alone and cannot fall back on an older one. Read against Ray 2.60 (Ray Train V2).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from functools import partial
from typing import Any, Literal

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from ultralong_ray.config import Recipe
from ultralong_ray.flops import ModelShape, ledger
from ultralong_ray.packed import PackedManifest
from ultralong_ray.parallel.allocator import allocator_environment
from ultralong_ray.planner.hardware import peak_flops
from ultralong_ray.planner.plan import as_json, hardware_of, plan_training
from ultralong_ray.planner.refuse import PlanRefused
from ultralong_ray.planner.words import describe_plan, plan_words, warmup_words
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train.controller import (
    BreakdownRecorder,
    ElasticTrainer,
    free_placement_groups,
    placement_groups_of_job,
)
from ultralong_ray.train.elastic import plans_by_size, with_workers
from ultralong_ray.train.events import NODE_VARIABLE, read_events, record_event
from ultralong_ray.train.failures import in_words, kind_of, memory_words, taken_over
from ultralong_ray.train.gauges import count_failure
from ultralong_ray.train.job import TrainJob, check_inputs
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.notices import PREEMPTED, STOPPED, Interrupted
from ultralong_ray.train.order import sequences_of_step
from ultralong_ray.train.patience import collective_timeout, longest_step_seconds
from ultralong_ray.train.preemption import Notices, stopped_by_sigterm, wait_for_the_end
from ultralong_ray.types import TrainPlan, UserError

logger = logging.getLogger(__name__)

# A rank whose collective broke waits so long before it says so: by then Ray knows which of its partners is dead.
PARTNER_SECONDS = 2.0
# A healthy run asks no more often than this whether there are more workers, and only just after a checkpoint.
RESIZE_SECONDS = 30.0
# An elastic run asks for what it counted, in which a node may be that was just lost; then it counts anew.
ELASTIC_START_SECONDS = 30.0
RAY_SETTINGS = {
    # The controller looks at its workers every 2 s by default, and a report waits for that look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Every 5 s by default; a node that is taken away may have 30 s left.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


def train(
    recipe: Recipe,
    section: Literal["pretrain", "sft"],
    packed: Location,
    model: Location,
    stage: StageDirectory,
    preflight_only: bool = False,
    resume_anyway: tuple[str, ...] = (),
    callbacks: tuple[UserCallback, ...] = (),
) -> dict[str, Any]:
    """Train `model` on `packed` as `recipe.<section>` says, into `<stage>/model`; Ray must be initialised.

    With `preflight_only` the workers build the model, check the machine and leave: {} is returned.

    Continues from the last checkpoint below `stage` where there is one, whatever the layout of its workers was. With
    `resume_anyway`, fields named as a refusal names them, that of another recipe's stage will do where there is none.
    `callbacks` of Ray Train hear what the workers report: the step, num_steps and the step's loss at every checkpoint.
    Returns {steps, tokens, first_loss, last_loss, seconds, resumed_from_step}. Raises UserError for what the user can
    mend, wherever it was found.
    """
    place = stage.location
    plans = _plans(recipe, section, model)
    recipe = with_workers(recipe, max(plans)) if plans else recipe
    plan = _plan(recipe, section, model, place)
    job = TrainJob(recipe, section, packed, model, place, stage.fingerprint, plan, preflight_only, resume_anyway, plans)
    check_inputs(job)
    job = dataclasses.replace(job, longest_step_seconds=_longest_step_seconds(job))
    _warn_of_warmup(job)
    if not preflight_only:
        record_event(place, "submit", driver=job.driver)
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # After a lost node Ray Train waits for another one for 60 s unless told otherwise, then asks anew.
    start_seconds = ELASTIC_START_SECONDS if plans else 60 * recipe.cluster.wait_minutes
    os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, f"{start_seconds:.0f}")
    handler = signal.getsignal(signal.SIGINT)
    try:
        with stopped_by_sigterm(job.stop_file, recipe.cluster.preemption_grace_seconds):
            result = _fit(job, callbacks)
    except (TrainingFailedError, RayActorError) as error:
        _record_stop(job, in_words(error))
        count_failure(place, section)
        _raise_user_error(job.error_file, error)
        raise
    except SystemExit:
        # Ray Train answers Ctrl-C with a handler of its own, which stops the workers and leaves the process.
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():  # a trial of Ray Tune is another one
            signal.signal(signal.SIGINT, handler)
    if job.error_file.exists():
        _record_stop(job, "see the failure before")
    _raise_user_error(job.error_file, None)
    if preflight_only:
        return {}
    if result.return_value is None:
        raise SystemExit(128 + signal.SIGTERM)
    _join(job)
    return _summary(job, result.return_value)


def _fit(job: TrainJob, callbacks: tuple[UserCallback, ...]) -> ray.train.Result:
    """Run Ray Train to its end. Where its controller itself is lost, or could not start the ranks, begin again.

    Ray Train restarts ranks; nobody restarts its controller (an actor on the driver's node) or retries a process group
    that broke while it was made. Raises what the last attempt raised once the recipe's max_failures are spent.
    """
    recorder, others = _recorder(job), placement_groups_of_job()
    while True:
        try:
            return _trainer(job, recorder, callbacks).fit()
        except (ControllerError, RayActorError) as error:
            if job.preflight_only:
                raise
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            what = "Ray Train's controller " + ("failed" if isinstance(error, ControllerError) else "died")
            recorder.record({}, f"{what}: {in_words(cause)}")
            if not job.recipe.cluster.max_failures or job.error_file.exists():
                raise
            if job.stop_file.exists():  # the driver was asked to end
                raise
            logger.warning("%s; training begins again from the last checkpoint", what)
            free_placement_groups(but=others)


def _recorder(job: TrainJob) -> BreakdownRecorder:
    """What the controller calls at every breakdown."""
    train, num_sequences = job.train, PackedManifest.read(job.packed).num_sequences
    batch = {"global_batch": train.global_batch_sequences, "num_sequences": num_sequences, "seed": train.seed}
    sequences_of = partial(sequences_of_step, **batch)
    return BreakdownRecorder(job.stage, job.recipe.cluster.max_failures, sequences_of, job.driver)


def _plans(recipe: Recipe, section: Literal["pretrain", "sft"], model: Location) -> dict[int, TrainPlan]:
    """The layouts for every number of workers that the recipe allows; {} where it names one number."""
    gpu_name, host_memory_gib = _found_on_cluster() if recipe.cluster.gpus_per_worker else (None, None)
    shape = ModelShape.from_config((model / "config.json").read_json())
    return plans_by_size(recipe, section, shape, gpu_name, host_memory_gib)


def _plan(recipe: Recipe, section: Literal["pretrain", "sft"], model: Location, stage: Location) -> TrainPlan:
    """The layout of this stage on the cluster as it is; logged, and written to `plan.json`.

    A layout that the recipe spells out to the last field is run even where it is predicted not to fit.
    """
    gpu_name, host_memory_gib = _found_on_cluster() if recipe.cluster.gpus_per_worker else (None, None)
    shape = ModelShape.from_config((model / "config.json").read_json())
    try:
        planned = plan_training(recipe, section, hardware_of(recipe, gpu_name, host_memory_gib), shape)
    except PlanRefused as refused:
        if refused.forced is None:
            raise
        logger.warning("%s\nEvery field of the layout is given, so it is tried all the same.", refused)
        (stage / "plan.json").write_json({"plan": dataclasses.asdict(refused.forced), "refused": str(refused)})
        return refused.forced
    if planned.prediction is None:
        logger.info("%s: %s", section, "; ".join([plan_words(planned.plan), *planned.notes]))
    else:
        logger.info("%s", describe_plan(planned, None))
    (stage / "plan.json").write_json(as_json(planned))
    return planned.plan


def _longest_step_seconds(job: TrainJob) -> float:
    """What a step of a healthy run may take on the fewest workers that the recipe allows."""
    cluster, length = job.recipe.cluster, PackedManifest.read(job.packed).sequence_length
    gpu_name = (cluster.gpu or _found_on_cluster()[0]) if cluster.gpus_per_worker else None
    shape = ModelShape.from_config((job.model / "config.json").read_json())
    flops = ledger(shape, length, job.plan).times(job.train.global_batch_sequences).model_flops_causal
    workers = min(job.plans, default=cluster.num_workers)
    return longest_step_seconds(flops, workers, peak_flops(gpu_name, cluster.peak_tflops_per_worker))


def _found_on_cluster() -> tuple[str | None, float | None]:
    """(GPU, GiB of host memory of the smallest node) of the nodes with GPUs; None where Ray does not say, or they
    differ. Ray 2.60 names the GPU in a label and in a resource, and splits a node's memory in two.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    prefix = "accelerator_type:"
    names = {key.removeprefix(prefix) for node in nodes for key in node["Resources"] if key.startswith(prefix)}
    sizes = [node["Resources"].get("memory", 0) + node["Resources"].get("object_store_memory", 0) for node in nodes]
    return names.pop() if len(names) == 1 else None, min(sizes, default=0) / 2**30 or None


def _trainer(job: TrainJob, recorder: BreakdownRecorder, callbacks: tuple[UserCallback, ...]) -> ElasticTrainer:
    cluster = job.recipe.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    storage = job.stage / "ray"
    return ElasticTrainer(
        _worker,
        sizes=tuple(job.plans),
        stage=job.stage,
        train_loop_config={"job": job},
        torch_config=TorchConfig(
            backend="nccl" if cluster.gpus_per_worker else "gloo",
            timeout_s=int(collective_timeout(job.first_step_seconds).total_seconds()),
        ),
        scaling_config=ScalingConfig(
            num_workers=(min(job.plans), max(job.plans)) if job.plans else cluster.num_workers,
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
            label_selector=cluster.node_label("train") or None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name="preflight" if job.preflight_only else "train",
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            # Ray counts all restarts of a run; the recorder counts those without progress
            failure_config=FailureConfig(max_failures=-1 if cluster.max_failures else 0),
            callbacks=[] if job.preflight_only else [recorder, *callbacks],
            worker_runtime_env={"env_vars": allocator_environment()} if cluster.gpus_per_worker else None,
        ),
    )


def _worker(config: dict[str, Any]) -> int | None:
    """One rank. Returns the step that it started from; None where an earlier attempt met a user's error, and where the
    driver asked for a stop."""
    context = ray.train.get_context()
    job: TrainJob = config["job"].for_world(context.get_world_size())
    if job.error_file.exists():
        return None
    if not job.recipe.cluster.gpus_per_worker:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ[NODE_VARIABLE] = _node_name()
    _quiet_worker_log()
    # deepspeed looks for its accelerator when it is imported, so not before the line above
    from ultralong_ray.train.loop import run

    notices = Notices(job.stop_file, context.get_world_rank(), job.recipe.cluster.preemption_grace_seconds)
    try:
        return run(job, ray.train.torch.get_device(), ray.train.report, notices)
    except Interrupted as interrupted:
        if interrupted.notice == STOPPED:
            return None
        if interrupted.notice == PREEMPTED and not job.recipe.cluster.max_failures:
            wait_for_the_end()
        raise
    except UserError as error:
        _record_failure(job, error)
        job.error_file.write_bytes(str(error).encode())
        raise
    except Exception as error:
        _record_failure(job, error)
        if kind_of(error) == "collective":
            time.sleep(PARTNER_SECONDS)
        raise


def _node_name() -> str:
    """Host, address and the beginning of Ray's id of this node: what `ray list nodes` and the dashboard show."""
    node_id = ray.get_runtime_context().get_node_id()
    return f"{socket.gethostname()}/{ray.util.get_node_ip_address()}/{node_id[:8]}"


def _record_failure(job: TrainJob, error: Exception) -> None:
    """This rank's account of what stops it; it must not hide the error itself. None among a later submission's."""
    rank = ray.train.get_context().get_world_rank()
    step, kind, cause = getattr(error, "step_in_flight", None), kind_of(error), in_words(error)
    try:
        if taken_over(read_events(job.stage), job.driver) is not None:
            return
        if kind == "memory":
            cause += f" ({_memory_beside_plan(job)})"
        logger.error("rank %d on %s, step %s: %s", rank, os.environ[NODE_VARIABLE], step, cause)
        node = os.environ[NODE_VARIABLE]
        attempt = getattr(error, "attempt", None)
        facts = {"rank": rank, "node": node, "step": step, "attempt": attempt, "kind": kind, "cause": cause}
        record_event(job.stage, "failure", **facts)
    except Exception:
        logger.exception("the failure of rank %d could not be recorded", rank)


def _record_stop(job: TrainJob, cause: str) -> None:
    """This driver gave up; nothing where a later submission trains on."""
    if taken_over(read_events(job.stage), job.driver) is None:
        record_event(job.stage, "stop", cause=cause)


def _memory_beside_plan(job: TrainJob) -> str:
    from ultralong_ray.train.loop import peak_memory_gib

    peak_gib = peak_memory_gib(ray.train.torch.get_device())
    return memory_words((job.stage / "plan.json").read_json(), peak_gib)


def _quiet_worker_log() -> None:
    """The package's lines to the worker's standard output, once each; torch's notes on its own renames left out."""
    package_log = logging.getLogger("ultralong_ray")
    package_log.setLevel(logging.INFO)
    package_log.addHandler(logging.StreamHandler(sys.stdout))
    package_log.propagate = False
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls, and says so at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def _warn_of_warmup(job: TrainJob) -> None:
    steps = job.num_steps(PackedManifest.read(job.packed).num_sequences)
    if (words := warmup_words(job.section, job.train, steps)) is not None:
        logger.warning("%s", words)


def _join(job: TrainJob) -> None:
    """Run `_consolidate` on a node that trains. Raises its UserError as it was, without Ray's traceback."""
    needs: dict[str, Any] = {"num_cpus": 1, "label_selector": job.recipe.cluster.node_label("train") or None}
    needs["scheduling_strategy"] = "DEFAULT"  # not inside the placement group of a trial of Ray Tune
    try:
        ray.get(ray.remote(**needs)(_consolidate).remote(job))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _consolidate(job: TrainJob) -> None:
    """The newest checkpoint to the Hugging Face folder `<stage>/model`, made anew. Runs as a Ray task, beside the disk.

    Raises UserError where there is no checkpoint, or a damaged one.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch

    from ultralong_ray.model.save import save_hf_folder
    from ultralong_ray.train.checkpoint import CHECKPOINTS, committed, full_weights

    root = job.stage / CHECKPOINTS
    names = committed(root)
    if not names:
        raise UserError(f"{root}: training ended without a checkpoint; see the log of the workers")
    dtype = torch.bfloat16 if job.train.precision == "bfloat16" else torch.float32
    target = job.stage / "model"
    target.delete_dir()  # a save that was killed leaves scratch files there
    save_hf_folder(target, job.model, full_weights(root / names[0]), dtype)


def _raise_user_error(error_file: Location, error: Exception | None) -> None:
    """Raise what a worker wrote for the user, or the UserError among the workers' failures."""
    if error_file.exists():
        words = error_file.read_bytes().decode()
        error_file.delete_file()  # no rank of this submission starts any more
        raise UserError(words) from error
    if isinstance(error, WorkerGroupError):  # the disk may have been too full for the file
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise UserError(str(failure)) from error


def _summary(job: TrainJob, resumed_from_step: int | None) -> dict[str, Any]:
    records = read_metrics(job.stage)
    return {
        "steps": records[-1].step,
        "tokens": records[-1].tokens,
        "first_loss": records[0].loss,
        "last_loss": records[-1].loss,
        "seconds": sum(record.step_seconds for record in records),
        "resumed_from_step": resumed_from_step or 0,
    }
