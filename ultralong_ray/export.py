"""Stage `export`: the trained model as a Hugging Face folder that anyone can load, checked by loading it.

In goes the folder that training wrote and what the run recorded; out comes `<stage>/model/`: safetensors, config with
the RoPE block, tokenizer with its chat template, generation config and a model card that states facts of the run only.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from ultralong_ray.config import Recipe, TrainConfig
from ultralong_ray.model.folder import HUB_ID, read_config, tensor_shapes
from ultralong_ray.model.rope import from_hf, inv_freq, to_older_hf
from ultralong_ray.storage import Location, StageDirectory, copy_files, local_folder
from ultralong_ray.types import UserError


def export(recipe: Recipe, model: Location, stage: StageDirectory, provenance: dict[str, Any]) -> dict[str, Any]:
    """Write `<stage>/model/` anew from the trained folder `model`, load it afresh, and return what was found.

    `provenance` maps a stage's name to what that stage recorded in its `_SUCCESS.json`; it goes into the model card.

    Raises: UserError when the folder does not hold the model that its config describes, or a weight is not finite.
    """
    target = stage.location / "model"
    target.delete_dir()  # an export that was killed leaves scratch files there
    copy_files(model, target, skip=("README.md",))
    _add_older_spelling(target / "config.json")
    with tempfile.TemporaryDirectory() as cache:  # evaluation may run on other machines
        folder = local_folder(target, Path(cache))
        found = verify(folder)
        config = read_config(folder)
    (target / "README.md").write_bytes(model_card(recipe, config, found, provenance).encode())
    return {
        "model": target.uri,
        "rope_parameters": config["rope_parameters"],
        "max_position_embeddings": config["max_position_embeddings"],
        **found,
    }


def _add_older_spelling(file: Location) -> None:
    """Say RoPE and dtype once more as transformers 4.x does, which would read past both without a word.

    transformers 5 reads either, and takes `rope_scaling` first where both are given.
    """
    config = file.read_json()
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    file.write_json(config | to_older_hf(config["rope_parameters"]) | dtype)


def verify(folder: Path) -> dict[str, Any]:
    """Load a folder from disk as a user would and compare it with its own config.

    Returns: parameter count, dtype, bytes of the weights.
    Raises: UserError naming missing, unexpected or non-finite tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensor_shapes(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # to be named below, like the others
        attn_implementation="eager",  # config.json may name a kernel that only GPU nodes have; nothing is computed here
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(str(name) for name in sorted(info[kind], key=str)[:5])
            raise UserError(f"{folder}: the weights do not fit config.json, {kind.replace('_', ' ')}: {names}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{folder}: {name} has values that are not finite; go back to an earlier checkpoint")
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises it bare
        raise UserError(
            f"{folder} has no tokenizer that transformers can read ({error}); export from a whole run"
        ) from error
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def model_card(recipe: Recipe, config: dict[str, Any], found: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The README.md of an exported model: how it was made, how to use it, what it cannot do."""
    sections = [
        _header(recipe),
        f"# {recipe.name}",
        f"{_origin(recipe)} Its window was set to {recipe.model.target_context_length:,} tokens. It has "
        f"{found['num_parameters']:,} parameters, stored as {found['dtype']}.",
        "## How it was made",
        "\n".join(_recipe_lines(recipe, config)),
        "## What the run recorded",
        _recorded(provenance),
        "## Use",
        _usage(recipe),
        "## Limits",
        "\n".join(_limits(recipe, config)),
    ]
    return "\n\n".join(sections) + "\n"


def _header(recipe: Recipe) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- long-context"]
    if (
        recipe.model.init == "pretrained"
        and not Path(recipe.model.base).exists()
        and HUB_ID.fullmatch(recipe.model.base)
    ):
        lines += [f"base_model: {recipe.model.base}"]
    return "\n".join([*lines, "---"])


def _origin(recipe: Recipe) -> str:
    if recipe.model.init == "random":
        return "This model was trained from random weights with ultralong_ray."
    revision = f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""
    return (
        f"This model continues `{recipe.model.base}`{revision}, whose window is "
        f"{recipe.model.base_context_length:,} tokens, with ultralong_ray (recipe: arXiv 2504.06214)."
    )


def _recipe_lines(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    rope, prepare = recipe.model.rope, recipe.prepare
    lines = [
        f"- RoPE: scheme `{rope.scheme}`, factor {rope.factor:g} measured from "
        f"{recipe.model.original_context_length:,} tokens; in `config.json`: `{config['rope_parameters']}` "
        f"(`rope_scaling` and `rope_theta` say the same to readers of transformers 4.x)",
        f"- Packing: sequences of {prepare.sequence_length:,} tokens, separator `{prepare.separator}`, "
        f"token budget {prepare.token_budget:,}, attention "
        + ("within each document" if recipe.pretrain.mask_documents else "causal over the whole pack"),
        _train_line("Continued pretraining", recipe.pretrain, prepare.sequence_length),
    ]
    if recipe.sft is not None:
        lines.append(_train_line("Supervised fine-tuning", recipe.sft, recipe.sft.sequence_length))
    return lines


def _train_line(title: str, train: TrainConfig, sequence_length: int) -> str:
    steps = f"{train.steps} steps" if train.steps else "one epoch"
    count = train.global_batch_sequences
    sequences = f"{count} sequence{'s' if count > 1 else ''} of {sequence_length:,} tokens"
    return (
        f"- {title}: {steps} of {sequences}, learning rate {train.learning_rate:g} ({train.schedule}, "
        f"{train.warmup_steps} warm-up steps), AdamW, {train.precision}"
    )


def _recorded(provenance: dict[str, Any]) -> str:
    """One table row per plain value that a stage recorded."""
    rows = [
        f"| {stage} | {name} | {value} |"
        for stage, summary in provenance.items()
        for name, value in summary.items()
        if isinstance(value, str | int | float) and name not in ("stage", "ended")
    ]
    return "\n".join(["| stage | what | value |", "|---|---|---|", *rows])


def _usage(recipe: Recipe) -> str:
    return f"""```python
import transformers

model = "path/to/this/folder"  # {recipe.name}
pipeline = transformers.pipeline("text-generation", model=model, dtype="auto")
messages = [{{"role": "user", "content": "What is the pass key? ..."}}]
print(pipeline(messages, max_new_tokens=64, do_sample=False)[0]["generated_text"][-1])
```"""


def _longest_trained(recipe: Recipe) -> int:
    return max(length for _, _, length in recipe.train_stages())


def _angles_line(recipe: Recipe, config: dict[str, Any]) -> str:
    """Which rotary angles the model was trained with, and what it meets elsewhere."""
    elsewhere = "transformers and vLLM compute rotary angles (position x frequency) in float32"
    if recipe.model.rope.angles == "float32":
        return f"- {elsewhere}; so did the training of this model (`rotary_angles` in `config.json`)."
    # Half the spacing of float32 at the largest angles, those of the first pair; interpolation slows that one too.
    length, found = _longest_trained(recipe), from_hf(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fastest = inv_freq(found.rope, head_dim, found.theta, found.original_context_length or 0)[0]
    worst = math.ldexp(0.5, math.frexp((length - 1) * fastest)[1] - 24)
    return (
        f"- This model was trained with exact rotary angles (`rotary_angles` in `config.json`). {elsewhere}, which "
        f"rounds the angles of the fastest pairs by up to {worst:.2g} rad at {length:,} tokens; "
        f"this project's own evaluation reads the field and computes them exactly."
    )


def _limits(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    return [
        f"- `max_position_embeddings` is {config['max_position_embeddings']:,}; the model was not trained on sequences "
        f"longer than {_longest_trained(recipe):,} tokens.",
        _angles_line(recipe, config),
        "- Language, knowledge, biases and licence terms of the base model carry over.",
        "- Scores are not part of this card; the run's report has them.",
    ]
