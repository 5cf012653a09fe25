"""The stages of a run, what feeds each, and where each writes. Pure planning: nothing is computed here.

    prepare ----+                 prepare_sft --+
                +--> pretrain ------------------+--> sft --> export --> evaluate --> report
    extend -----+

A stage writes `<workdir>/<stage>-<fingerprint>/`. The fingerprint covers the stage's own fields of the recipe, the
version of its output format and the fingerprints of its inputs, so a changed recipe never reads a stale result and an
unchanged one never computes twice. Content behind a URI is not hashed: give new data a new name.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import MissingInput

# Raised when a stage's output format or meaning changes, so that older directories are not mistaken for new ones.
FORMAT_VERSIONS = {
    "prepare": 2,
    "prepare_sft": 3,
    "extend": 1,
    "pretrain": 2,
    "sft": 2,
    "export": 1,
    "evaluate": 2,
    "report": 2,
    "refine": 1,  # a job beside the pipeline, see data/refine.py
    "tune": 1,  # another one, see tune/run.py
}

TRIALS_FILE = "tune.json"  # the table that `tune` leaves and `report` shows

# Those that leave a model in `model/`.
OF_MODELS = ("extend", "pretrain", "sft", "export")

# The script that runs each stage.
JOB_OF_STAGE = {"prepare_sft": "prepare"}


def stages(recipe: Recipe) -> list[str]:
    """The stages of this recipe, in the order in which they can run."""
    names = ["prepare", "extend", "pretrain"]
    if recipe.sft is not None:
        names[1:1] = ["prepare_sft"]
        names.append("sft")
    names.append("export")
    if recipe.evaluate is not None:
        names.append("evaluate")
    names.append("report")
    return names


def inputs(recipe: Recipe, stage: str) -> list[str]:
    """The stages whose output `stage` reads."""
    last_training = "sft" if recipe.sft is not None else "pretrain"
    if stage == "pretrain":
        return ["prepare", "extend"]
    if stage == "sft":
        return ["prepare_sft", "pretrain"]
    if stage == "export":
        return [last_training]
    if stage == "evaluate":
        assert recipe.evaluate is not None
        return ["prepare", *sorted({stage_of_model(recipe, m) for m in recipe.evaluate.models} - {"base"})]
    if stage == "report":
        return [name for name in stages(recipe) if name not in ("extend", "report")]
    return []


def stage_of_model(recipe: Recipe, model: str) -> str:
    """The stage whose `model/` folder holds an evaluated model; "base" is the recipe's own."""
    return {"base": "base", "extended": "extend", "pretrained": "pretrain", "final": "export"}[model]


def stage_directory(recipe: Recipe, stage: str) -> StageDirectory:
    fingerprint = stage_fingerprint(recipe, stage)
    return StageDirectory(stage, fingerprint, workdir(recipe) / f"{stage}-{fingerprint}")


def workdir(recipe: Recipe) -> Location:
    """The recipe's working directory, reached as its [storage] section says."""
    return Location.of(recipe.workdir, recipe.storage.options)


def stage_fingerprint(recipe: Recipe, stage: str) -> str:
    """12 hex digits over the stage's own fields and its inputs' fingerprints."""
    content = {
        "stage": stage,
        "format": FORMAT_VERSIONS[stage],
        "fields": _own_fields(recipe, stage),
        "inputs": {name: stage_fingerprint(recipe, name) for name in inputs(recipe, stage)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _own_fields(recipe: Recipe, stage: str) -> dict[str, Any]:
    tokenizer = {"base": recipe.model.base, "revision": recipe.model.revision}
    if stage == "prepare":
        fields = {**recipe.corpus.fingerprint_fields(), **recipe.prepare.fingerprint_fields()}
        return {**tokenizer, **fields, **_decontamination(recipe)}
    if stage == "prepare_sft":
        assert recipe.sft is not None
        names = ("sources", "sequence_length", "max_sample_tokens", "num_samples", "seed")
        names += ("domain_mix", "domain_samples", "deduplicate")
        fields = {name: recipe.sft.fingerprint_fields()[name] for name in names}
        if recipe.sft.long_samples_first:
            fields["long_samples_first"] = True
        return {**tokenizer, **fields, **_decontamination(recipe)}
    if stage == "refine":
        assert recipe.refine is not None
        return recipe.refine.fingerprint_fields()
    if stage == "tune":
        assert recipe.tune is not None
        compared = [
            stage_fingerprint(recipe, name) for name in ("pretrain", "sft", "evaluate") if name in stages(recipe)
        ]
        return {**recipe.tune.fingerprint_fields(), "recipe": compared}
    if stage == "extend":
        return recipe.model.fingerprint_fields()
    if stage == "pretrain":
        return recipe.pretrain.fingerprint_fields()
    if stage == "sft":
        assert recipe.sft is not None
        return recipe.sft.fingerprint_fields()
    if stage == "export":
        return {"name": recipe.name}
    if stage == "evaluate":
        assert recipe.evaluate is not None
        return {**tokenizer, **recipe.evaluate.fingerprint_fields()}
    return {"name": recipe.name}


def _decontamination(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.decontaminate is None else {"decontaminate": recipe.decontaminate.fingerprint_fields()}


def require_inputs(recipe: Recipe, stage: str, recipe_path: str) -> None:
    """Refuse to run `stage` before its inputs are there, naming each and the command that makes it.

    `recipe_path`: with the overrides of the command line behind it, which decide where the inputs lie.
    """
    names = [name for name in inputs(recipe, stage) if not _holds_nothing_for(recipe, stage, name)]
    found = [stage_directory(recipe, name) for name in names]
    if stage == "report" and (any(directory.done for directory in found) or _has_trials(recipe)):
        return  # it shows what there is, and says what is not
    lines = [
        f"  {d.location} {words} run  python jobs/{JOB_OF_STAGE.get(d.stage, d.stage)}.py {recipe_path}"
        for d in found
        if (words := _absence(d)) is not None
    ]
    if lines:
        raise MissingInput(
            f"{stage} cannot start, its input has not been made:\n" + "\n".join(lines) + "\n"
            f"or run the whole pipeline:  python jobs/pipeline.py {recipe_path}"
        )


def _has_trials(recipe: Recipe) -> bool:
    """Whether there is the table of `jobs/tune.py`, which needs no stage of this recipe."""
    return recipe.tune is not None and (stage_directory(recipe, "tune").location / TRIALS_FILE).exists()


def _absence(directory: StageDirectory) -> str | None:
    """What a later stage would not find, and the what is to be done first; None where all is there."""
    if not directory.done:
        return "is missing:"
    if directory.stage in OF_MODELS and not (directory.location / "model/config.json").exists():
        return "is done, but its model is gone: remove that folder and"
    return None


def _holds_nothing_for(recipe: Recipe, stage: str, source: str) -> bool:
    """An evaluation reads of `prepare` the held-out sequences alone."""
    return stage == "evaluate" and source == "prepare" and not recipe.prepare.holds_out
