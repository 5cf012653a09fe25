"""Stage `extend`: the base model's folder becomes the same model with a longer window. No tensor is touched.

In goes `[model]` of the recipe; out comes `<stage>/model/`: `config.json` with the new RoPE block and window, the
weights copied as files, generation config and tokenizer with their limits raised. With init = "random" the config is
built from `[model.architecture]` and there are no weights. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultralong_ray.config import ArchitectureConfig, ModelConfig, Recipe
from ultralong_ray.model import rope as rope_schemes
from ultralong_ray.model.folder import (
    INDEX_FILE,
    base_folder,
    copy_tokenizer,
    read_config,
    read_json,
    weight_files,
)
from ultralong_ray.model.rope import NTK_FIELD
from ultralong_ray.model.stored_weights import check_weights
from ultralong_ray.storage import Location, StageDirectory, copy_file
from ultralong_ray.types import UserError

MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
CHECKED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Spellings of older transformers releases that the new block replaces, and a field that would overrule the block's own.
REPLACED_KEYS = ("rope_scaling", "rope_theta", "torch_dtype", "original_max_position_embeddings", NTK_FIELD)


def extend(recipe: Recipe, stage: StageDirectory) -> dict[str, Any]:
    """Write `<stage>/model/` and return what was done, for `_SUCCESS.json`.

    Raises: UserError when the base cannot be extended as the recipe asks (see `check_base`).
    """
    model = recipe.model
    folder = base_folder(model, recipe.storage.options)
    base_rope = None
    if model.init == "random":
        assert model.architecture is not None
        config, full = random_config(model, model.architecture), None
    else:
        raw = read_config(folder)
        base_rope, full = check_base(model, folder, raw)
        config = extended_config(model, raw, base_rope.theta, _head_dim(full))
    target = stage.location / "model"
    tokenizer = _write_tokenizer(model, folder, target)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if vocabulary > config["vocab_size"]:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {vocabulary - 1}, the model's vocab_size is "
            f"{config['vocab_size']}; take out tokens that were added to it, or give a model that embeds them"
        )
    parameters = None if full is None else check_weights(folder, full)
    (target / "config.json").write_json(config)
    (target / "generation_config.json").write_json(_generation_config(folder, config, tokenizer))
    if model.init == "pretrained":
        _copy_weights(folder, target)
    return {
        "base": model.base,
        "revision": model.revision,
        "init": model.init,
        "model_type": config["model_type"],
        "num_parameters": parameters,
        "rope_parameters": config["rope_parameters"],
        "base_rope_scheme": base_rope.rope.scheme if base_rope else None,
        "base_rope_factor": base_rope.rope.factor if base_rope else None,
        "max_position_embeddings": config["max_position_embeddings"],
    }


def check_base(model: ModelConfig, folder: Path, raw: dict[str, Any]) -> tuple[rope_schemes.HfRope, Any]:
    """Refuse a base that the recipe does not describe or that cannot be extended; else its RoPE and transformers'
    config, which fills in what `raw` leaves to defaults.

    Raises: UserError for all that `check_written` refuses, here of defaults too, and a shape unlike
    `[model.architecture]`.
    """
    check_written(model, folder, raw)
    with _config_in_words(folder):
        from transformers import AutoConfig

        full = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        base = rope_schemes.from_hf(
            {"rope_parameters": full.rope_parameters, NTK_FIELD: getattr(full, NTK_FIELD, None)}
        )
    window = getattr(full, "sliding_window", None)
    if "sliding_attention" in (getattr(full, "layer_types", None) or ()) or window is not None:
        raise _limited(folder, window)
    _check_dropout(folder, getattr(full, "attention_dropout", 0.0))
    if model.architecture is not None:
        _check_architecture(folder, model.architecture, full, base.theta)
    _check_stretch(model, folder, base, full.max_position_embeddings)
    return base, full


def check_written(model: ModelConfig, folder: Path, raw: dict[str, Any]) -> None:
    """What the config.json of a base tells by itself, without transformers, so that a dry run can ask.

    Raises: UserError for another model family, quantised weights, sliding-window attention, attention dropout, a RoPE
    measured from another original length, or one already stretched further.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_CLASSES:
        raise UserError(
            f"{folder}/config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_CLASSES)}"
        )
    if quantised := raw.get("quantization_config"):
        raise UserError(
            f"{folder}/config.json: quantization_config {quantised.get('quant_method', quantised)}: training needs "
            f"whole weights; give the model that this one was quantised from"
        )
    if "vocab_size" not in raw:
        raise UserError(f"{folder}/config.json has no vocab_size; fetch the model again")
    window = raw.get("sliding_window")
    if window is not None and raw.get("use_sliding_window", kind == "mistral"):  # of Qwen a field without effect
        raise _limited(folder, window)
    _check_dropout(folder, raw.get("attention_dropout") or 0.0)
    block = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if "rope_theta" in block or "rope_theta" in raw:  # else a default of transformers
        with _config_in_words(folder):
            base = rope_schemes.from_hf(raw)
        _check_stretch(model, folder, base, raw.get("max_position_embeddings"))


@contextlib.contextmanager
def _config_in_words(folder: Path) -> Iterator[None]:
    """What transformers and pydantic raise about a config.json, as a UserError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{folder}/config.json describes no model that can be extended ({type(error).__name__}: {said}); mend that "
            f"field, or fetch the model again"
        ) from error


def _limited(folder: Path, window: int | None) -> UserError:
    return UserError(
        f"{folder}/config.json: sliding_window {window} limits how far a token sees, so a longer RoPE would not "
        f"lengthen it; use a model with full attention (sliding_window null)"
    )


def _check_dropout(folder: Path, dropout: float) -> None:
    if dropout:
        raise UserError(
            f"{folder}/config.json: attention_dropout {dropout:g}: training here is without attention dropout; "
            f"set it to 0 in that file"
        )


def _check_architecture(folder: Path, shape: ArchitectureConfig, full: Any, theta: float) -> None:
    """Name every field in which the recipe and the base disagree, with both values."""
    found = {name: getattr(full, name, None) for name in CHECKED_FIELDS}
    found |= {"model_type": full.model_type, "rope_theta": theta}
    found["head_dim"] = _head_dim(full)
    asked = shape.model_dump(exclude={"initializer_range"})
    asked["head_dim"] = _head_dim(shape)
    wrong = [f"{name}: recipe {asked[name]}, base {found[name]}" for name in asked if asked[name] != found[name]]
    if wrong:
        raise UserError(
            f"[model.architecture] does not describe {folder} ({'; '.join(wrong)}); mend those fields or leave the "
            f"section out"
        )


def _check_stretch(model: ModelConfig, folder: Path, base: rope_schemes.HfRope, window: int | None) -> None:
    """`window`: the base's max_position_embeddings, where it is known."""
    if base.rope.scheme == "none":
        for field in ("original_context_length", "base_context_length"):
            if window is not None and (given := getattr(model, field)) > window:
                raise UserError(
                    f"model.{field} {given:,} is beyond max_position_embeddings {window:,} of {folder}/config.json, "
                    f"whose RoPE is not stretched; give at most that"
                )
        return
    if base.unread_fields and model.rope.scheme == base.rope.scheme:
        raise UserError(
            f"{folder}/config.json: {', '.join(base.unread_fields)} of its {base.rope.scheme} RoPE would be lost; take "
            f"them out of that file if the longer window can go without them, or choose another model.rope.scheme"
        )
    original = base.original_context_length
    if original is not None and original != model.original_context_length:
        raise UserError(
            f"model.original_context_length {model.original_context_length} disagrees with {folder}/config.json, "
            f"whose RoPE is measured from original_max_position_embeddings {original}; give {original}"
        )
    asked = 1.0 if model.rope.scheme == "none" else model.rope.factor
    if base.rope.factor > asked:
        raise UserError(
            f"model.rope.factor {asked:g} (scheme {model.rope.scheme}) would shrink the window: {folder} already has "
            f"{base.rope.scheme} factor {base.rope.factor:g}, measured from the same original length; "
            f"give at least {base.rope.factor:g}"
        )


def extended_config(model: ModelConfig, raw: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    """The base's config.json with the new RoPE block and window; every other field stays."""
    config = {key: value for key, value in raw.items() if key not in REPLACED_KEYS}
    if "dtype" not in config and "torch_dtype" in raw:
        config["dtype"] = raw["torch_dtype"]
    config["rope_parameters"] = rope_schemes.to_hf(model.rope, head_dim, theta, model.original_context_length)
    config["max_position_embeddings"] = model.exported_max_position_embeddings
    config["rotary_angles"] = model.rope.angles
    if model.rope.scheme == "ntk":
        config[NTK_FIELD] = rope_schemes.ntk_record(model.rope, theta, model.original_context_length)
    return config


def random_config(model: ModelConfig, shape: ArchitectureConfig) -> dict[str, Any]:
    """A config.json for a model that does not exist yet, in the shape of `[model.architecture]`."""
    head_dim = _head_dim(shape)
    return {
        "architectures": [MODEL_CLASSES[shape.model_type]],
        **shape.model_dump(exclude={"rope_theta"}),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "sliding_window": None,
        "dtype": "float32",
        "rope_parameters": rope_schemes.to_hf(model.rope, head_dim, shape.rope_theta, model.original_context_length),
        "max_position_embeddings": model.exported_max_position_embeddings,
        "rotary_angles": model.rope.angles,
    }


def _head_dim(shape: Any) -> int:
    """Of `[model.architecture]` or of a transformers config, where families without the field leave it out."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def _write_tokenizer(model: ModelConfig, folder: Path, target: Location) -> Any:
    """Copy the tokenizer with model_max_length set to the target, and return it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises it bare
        raise UserError(f"{folder} has no tokenizer that transformers can read ({error})") from error
    copy_tokenizer(folder, target)
    limits = target / "tokenizer_config.json"
    settings = limits.read_json() if limits.exists() else {}
    limits.write_json(settings | {"model_max_length": model.exported_max_position_embeddings})
    return tokenizer


def _generation_config(folder: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The base's generation config; a limit on the whole length, where it has one, becomes the new window.

    Special tokens that neither it nor config.json names are the tokenizer's: without one that ends an answer
    transformers writes on.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known = config.get(name) if config.get(name) is not None else getattr(tokenizer, name)
        if settings.get(name) is None and known is not None:
            settings[name] = known
    if "max_length" in settings:
        settings["max_length"] = config["max_position_embeddings"]
    return settings


def _copy_weights(folder: Path, target: Location) -> None:
    for path in weight_files(folder):
        copy_file(path, target / path.name)
    if (folder / INDEX_FILE).is_file():
        copy_file(folder / INDEX_FILE, target / INDEX_FILE)
