"""A driver to be killed: `run_prepare.py RECIPE.json SECONDS` runs the prepare stage on a Ray of its own.

Every task waits SECONDS before its work, so that there is a middle of the run to be killed in.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray

from ultralong_ray.config import Recipe
from ultralong_ray.data import pipeline
from ultralong_ray.stages import stage_directory

if __name__ == "__main__":
    settings = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
    pause = float(sys.argv[2])
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    pipeline.TOKENS_PER_FILE = 7 * 512
    tokenize, pack = pipeline.tokenize_part, pipeline.pack_file

    def slowly(work: Any) -> Any:
        def waiting(item: Any) -> Any:
            time.sleep(pause)
            return work(item)

        return waiting

    pipeline.tokenize_part, pipeline.pack_file = slowly(tokenize), slowly(pack)
    stage = stage_directory(settings, "prepare")
    stage.mark_done(pipeline.prepare(settings, stage))
