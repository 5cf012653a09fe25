"""Read a recipe: a TOML file, then dotted overrides from the command line (`--pretrain.learning_rate 1e-5`).

pydantic-settings 2.16 merges the two; the result is validated once as a `Recipe`. Every complaint names the key, the
value and the rule.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings import SettingsError as OverrideError

from ultralong_ray.config import Recipe
from ultralong_ray.types import UserError


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """The validated recipe of a TOML file with command-line overrides applied.

    Raises UserError for an absent file, broken TOML, unknown keys, wrong values and contradictions.
    """
    values = _read_toml(path)
    if overrides:
        values = _merge(values, _parse_overrides(overrides))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, path)) from None


def _read_toml(path: str) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"recipe {path} does not exist (looked in {file.absolute().parent}); give the path of a TOML file"
        )
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is no valid TOML: {error}") from None


def _parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Overrides as a nested dict holding only the keys that were given; `key=value` is read like `--key value`."""
    arguments = [a if a.startswith("-") or "=" not in a else f"--{a}" for a in arguments]

    fields: dict[str, Any] = {name: (info.annotation, info) for name, info in Recipe.model_fields.items()}
    keys = create_model("Overrides", __base__=BaseSettings, **fields)
    try:
        return CliSettingsSource(keys, cli_parse_args=arguments, cli_exit_on_error=False)()
    except OverrideError as error:
        raise UserError(
            f"override not understood: {error}. Overrides are keys of the recipe, as in --pretrain.learning_rate 1e-5"
        ) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def explain(error: ValidationError, path: str) -> str:
    """One line per fault: the dotted key, the value, the rule."""
    lines = [f"recipe {path} is not valid:"]
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        value = "" if fault["type"] in ("missing", "value_error") else f" = {fault['input']!r}"
        lines.append(f"  {key}{value}: {message}")
    return "\n".join(lines)
