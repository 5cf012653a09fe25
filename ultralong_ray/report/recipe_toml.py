"""A recipe as TOML text that reads back as the same recipe. The standard library reads TOML but does not write it."""

from __future__ import annotations

import json
from typing import Any

from ultralong_ray.config import Recipe

MAX_INLINE_CHARACTERS = 100


def recipe_toml(recipe: Recipe) -> str:
    """Every field, defaults included; a field that is None is left out, as TOML has no null."""
    return "\n".join(_table(recipe.model_dump(mode="json"), "")).strip() + "\n"


def _table(fields: dict[str, Any], path: str) -> list[str]:
    """Lines of one table: plain values first, since a key after a [header] would belong to that header."""
    lines, nested = [], []
    for key, value in fields.items():
        name = key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)
        inner = f"{path}.{name}" if path else name
        if value is None:
            continue
        if isinstance(value, dict):
            nested += ["", f"[{inner}]", *_table(value, inner)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                nested += ["", f"[[{inner}]]", *_table(item, inner)]
        else:
            lines.append(f"{name} = {_value(value)}")
    return lines + nested


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which JSON leaves bare and TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        items = [_value(item) for item in value]
        line = f"[{', '.join(items)}]"
        return line if len(line) <= MAX_INLINE_CHARACTERS else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return repr(value)
