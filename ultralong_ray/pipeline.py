"""The whole recipe: every stage as a driver of its own, one after the other.

A stage is the same script that can be submitted alone. Run as a child process of the submitted pipeline it starts with
clean memory, joins the same cluster with the same working directory, and ends with the pipeline: Ray stops a job with
all processes below it, so nothing runs on unseen. (The Ray dashboard shows the drivers under the pipeline's entry.) A
stage that is done starts nothing.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

from ultralong_ray.config import Recipe
from ultralong_ray.stages import JOB_OF_STAGE, stage_directory, stages
from ultralong_ray.types import UserError

log = logging.getLogger("ultralong_ray")


def run_pipeline(recipe: Recipe, recipe_path: str, overrides: list[str], jobs_folder: Path) -> None:
    """Run the stages in order; raises UserError naming the stage that failed and how to continue."""
    began = time.monotonic()
    names = stages(recipe)
    for number, stage in enumerate(names, start=1):
        directory = stage_directory(recipe, stage)
        log.info("[%d/%d] %s: %s", number, len(names), stage, "done already" if directory.settled else "starting")
        if directory.settled:
            continue
        script = jobs_folder / f"{JOB_OF_STAGE.get(stage, stage)}.py"
        status = _run([sys.executable, str(script), recipe_path, *overrides])
        if status != 0:
            raise UserError(
                f"stage {stage} ended with status {status}, its message stands above. Finished stages are kept: "
                f"mend the cause and submit the same command again"
            )
    report = stage_directory(recipe, "report").location / "report.html"
    log.info("pipeline is done in %.0f s", time.monotonic() - began)
    print(f"report: {report}", flush=True)


def _run(command: list[str]) -> int:
    """The command's exit status; when this process is stopped, the command is told to stop and waited for."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()  # it may save for cluster.preemption_grace_seconds
        raise
