"""Hugging Face model folders as files: fetch the base model, list and measure its weights, copy what travels along.

In goes `[model]` of the recipe (a local path, a URI or a hub id); out comes a local folder whose weights are known to
be whole safetensors. Nothing here builds a model, and no code from a model folder is ever run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ultralong_ray.config import ModelConfig
from ultralong_ray.storage import DEFAULT_OPTIONS, Location, copy_file, local_folder
from ultralong_ray.types import StorageOptions, UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES_FOLDER = "additional_chat_templates"  # where transformers puts all but the default one, as NAME.jinja
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
HUB_LEFT_OUT = ["consolidated*", "original/*"]  # the same weights once more, in their makers' own format
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def base_folder(model: ModelConfig, options: StorageOptions = DEFAULT_OPTIONS, cache: Path | None = None) -> Path:
    """The base model as a local folder with a `config.json` (with init = "random": a tokenizer is enough).

    `options`: how an s3:// base is reached. Raises: UserError when there is no such folder or hub model.
    """
    if "://" in model.base or Path(model.base).expanduser().exists():
        folder = local_folder(Location.of(model.base, options), cache)
    elif HUB_ID.fullmatch(model.base):
        folder = _from_hub(model)
    else:
        raise UserError(f"model.base {model.base!r}: no such folder, and not of the form owner/name of a hub model")
    needed = "config.json" if model.init == "pretrained" else "tokenizer_config.json"
    if not (folder / needed).is_file():
        raise UserError(f"model.base {model.base!r}: {folder} has no {needed}; give a Hugging Face model folder")
    return folder


def _from_hub(model: ModelConfig) -> Path:
    """Download with huggingface_hub (written against 2.4); its own cache and locks are used."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model.base, revision=model.revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_LEFT_OUT
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.base {model.base!r} (revision {model.revision or 'main'}): no folder of that name here, and the "
            f"hub did not give it: {error}. Check the name, the network and, for a gated model, HF_TOKEN"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json`. Raises: UserError when it is not JSON."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder. Raises: UserError when it is none."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is a JSON {type(found).__name__}, not an object; fetch the model again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, all present.

    Raises: UserError for a folder with pickled weights only, none at all, or a shard missing.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX_FILE} names no tensors in weight_map; fetch it again")
        names = sorted(set(weight_map.values()))
    elif (folder / WEIGHTS_FILE).is_file():
        names = [WEIGHTS_FILE]
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise UserError(
                f"{folder} has pickled weights only ({', '.join(pickled[:3])}), which can run code when loaded; "
                f"convert them to safetensors"
            )
        raise UserError(f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {INDEX_FILE} names {', '.join(missing[:3])}, which is not there; fetch it again")
    return [folder / name for name in names]


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every stored tensor, from the file headers only.

    Raises: UserError naming a truncated or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from error
    return shapes


def copy_tokenizer(source: Path | Location, target: Location) -> None:
    """Copy what there is of a tokenizer's files, every chat template included."""
    origin = Location.of(source)
    for name in TOKENIZER_FILES:
        if (origin / name).exists():
            copy_file(origin / name, target / name)
    for template in (origin / TEMPLATES_FOLDER).files():
        copy_file(template, target / TEMPLATES_FOLDER / template.name)
