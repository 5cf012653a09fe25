"""Read a recipe: a TOML file, then dotted overrides from the command line (`--pretrain.learning_rate 1e-5`).

The merged values are validated once as a `Recipe`. Every complaint names the key, the value and the rule.
(pydantic-settings was tried for the command line; it can neither set a table to null nor reach into a list.)
"""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ultralong_ray.config import Recipe
from ultralong_ray.types import UserError


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """The validated recipe of a TOML file with command-line overrides applied.

    Raises UserError for an absent file, broken TOML, unknown keys, wrong values and contradictions.
    """
    values = _read_toml(path)
    for key, value in parse_overrides(overrides or []):
        _override(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, path, values)) from None


def load_recipe_on(path: str, num_workers: int, overrides: list[str]) -> Recipe:
    """The recipe for so many workers in place of its own; as it stands where that is all that makes it invalid.

    Raises: UserError as `load_recipe` does.
    """
    try:
        return load_recipe(path, [*overrides, f"cluster.num_workers={num_workers}"])
    except UserError as refusal:
        with contextlib.suppress(UserError):
            return load_recipe(path, overrides)
        raise refusal


def with_values(recipe: Recipe, values: dict[str, Any], what: str) -> Recipe:
    """`recipe` with dotted keys changed. Raises UserError, which names `what`, where that makes no valid recipe."""
    changed = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        _override(changed, key, value)
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise UserError(explain(error, what, changed)) from None


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
    except OSError as error:
        raise UserError(
            f"recipe {path} cannot be read ({error.strerror}); give a file that this user may read"
        ) from None


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """(dotted key, value) of each override: `--key value`, `--key=value` or `key=value`.

    A value is read as JSON, else as a TOML value, else as a string. Raises UserError for a key without a value.
    """
    overrides, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--") or not rest:
                raise UserError(
                    f"override {argument!r} not understood: give a key of the recipe and its value, as in "
                    f"--pretrain.learning_rate 1e-5 or pretrain.learning_rate=1e-5"
                )
            text = rest.pop(0)
        overrides.append((key, _value(text)))
    return overrides


def _value(text: str) -> Any:
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    with contextlib.suppress(tomllib.TOMLDecodeError):
        return tomllib.loads(f"value = {text}")["value"]
    return text


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a number in it is a position in a list, as in corpus.sources.0.uri."""
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list):
            place = _item(place, part, key)
            if not isinstance(place, dict | list):
                raise UserError(f"override {key}: position {part} holds {place!r}, which has no keys to set")
        else:
            if not isinstance(place.get(part), dict | list):
                place[part] = {}
            place = place[part]
    if isinstance(place, list):
        _item(place, last, key)
        place[int(last)] = value
    else:
        place[last] = value


def _item(place: list[Any], part: str, key: str) -> Any:
    if not part.isdecimal() or int(part) >= len(place):
        raise UserError(f"override {key}: {part!r} is no position in a list of {len(place)}; the first is 0")
    return place[int(part)]


def explain(error: ValidationError, path: str, values: dict[str, Any]) -> str:
    """One line per fault of `values`: the dotted key, the value, the rule."""
    lines = [f"recipe {path} is not valid:"]
    faults = error.errors(include_url=False)
    for fault in faults:
        if fault["type"] == "too_short" and any(_is_within(other["loc"], fault["loc"]) for other in faults):
            continue  # pydantic does not count what is not valid: the list is as long as it was written
        key = ".".join(_written(fault["loc"], values, fault["type"] == "missing")) or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "unknown key; remove it or correct its spelling"
        value = "" if fault["type"] in ("missing", "value_error") else f" = {fault['input']!r}"
        lines.append(f"  {key}{value}: {message}")
    return "\n".join(lines)


def _written(place: tuple[int | str, ...], values: Any, last_is_missing: bool) -> Iterator[str]:
    """The parts of a place that the recipe has: pydantic puts the members of a union that it tried between them."""
    for number, part in enumerate(place):
        try:
            values = values[part]
        except (LookupError, TypeError):
            if not (last_is_missing and number == len(place) - 1):
                continue
        yield str(part)


def _is_within(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer
