"""A quickstart in miniature, one driver: `python -m tests.watch.small_run WORKDIR STAGE,STAGE [--key value]`."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from ultralong_ray.job import connect_to_ray, run_stage
from ultralong_ray.recipe import load_recipe
from ultralong_ray.types import UserError

RECIPE = str(Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "quickstart.toml")
SMALL = (
    "--prepare.sequence_length 1024 --model.target_context_length 1024 --model.rope.factor 2 "
    "--prepare.token_budget 16384 --prepare.holdout_sequences 2 "
    "--pretrain.global_batch_sequences 2 --pretrain.warmup_steps 0 "
    '--evaluate.models ["base"] --evaluate.context_lengths [256,512] --evaluate.depths_percent [0,100] '
    "--evaluate.samples_per_cell 1"
)


def main(workdir: str, stages: str, overrides: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    # Without SFT and RULER the whole way from corpus to report is much shorter.
    text = re.sub(r"^\[sft\].*?(?=^\[evaluate\])", "", Path(RECIPE).read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\[\[evaluate\.tasks\]\].*?(?=^\[cluster\])", "", text, flags=re.DOTALL | re.MULTILINE)
    file = Path(workdir).with_suffix(".toml")
    file.write_text(text)
    recipe = load_recipe(str(file), ["--workdir", workdir, *SMALL.split(), *overrides])
    connect_to_ray()
    for stage in stages.split(","):
        run_stage(recipe, stage, str(file))


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3:])
    except UserError as error:
        sys.exit(f"error: {error}")
