"""Who may import whom. The package is parsed, not imported, so lazy and typing-only imports are seen as well.

A room is a top-level module or package of ultralong_ray. Rooms meet at files whose schema is in `types`, and the heavy
libraries stay in the few files named here, so that each can be replaced, and read, alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "ultralong_ray"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# Room -> the rooms that it may import besides itself; None: any.
MAY_IMPORT: dict[str, set[str] | None] = {
    "types": set(),
    "config": {"types"},
    "object_store": {"types"},
    "endpoint": {"types"},
    "storage": {"types", "object_store"},
    "stages": {"types", "config", "storage"},
    "recipe": {"types", "config"},
    "watch": set(),
    "flops": {"types", "config"},
    "nodes": {"types", "config"},
    "planner": {"types", "config", "flops"},
    "plan": {"types", "config", "storage", "stages", "flops", "planner", "model"},
    "manifests": {"types", "config", "planner", "plan"},
    "packed": {"types", "storage"},
    "data": {"types", "config", "endpoint", "object_store", "storage", "packed", "stages", "watch"},
    "model": {"types", "config", "storage"},
    "parallel": {"types", "config", "packed"},
    "train": {"types", "config", "object_store", "storage", "packed", "model", "parallel", "flops", "planner", "watch"},
    "export": {"types", "config", "storage", "model"},
    "eval": {"types", "config", "endpoint", "storage", "model", "parallel", "watch"},
    "report": {"types", "config", "storage", "stages", "recipe"},
    "benchmark": {
        "types",
        "config",
        "storage",
        "data",
        "flops",
        "planner",
        "model",
        "parallel",
        "train",
        "eval",
        "watch",
    },
    "tune": None,
    "job": None,
    "pipeline": None,
}

# Heavy library -> patterns of the files, relative to the package, that may import it.
HEAVY: dict[str, str] = {
    "ray": (
        r"data/fan_out\.py|train/(trainer|controller|loop|checkpoint|preemption|worker)\.py"
        r"|eval/(fanout|sharded_group|vllm_engine)\.py|tune/run\.py|(job|nodes)\.py|watch/metrics\.py"
    ),
    "deepspeed": r"train/(engine|partition)\.py|benchmark/(alst|gradients)\.py",
    "torch": r"(model|parallel|train|benchmark)/.*|eval/[^/]*|export\.py|export/.*",
    "transformers": r"(data|model|parallel|train)/.*|eval/[^/]*|export(\.py|/.*)|benchmark/(alst|torch_cp|prefill)\.py",
    "pydantic": r"config/.*|recipe\.py",
    "datasketch": r"data/deduplicate\.py",
    "aiohttp": r"endpoint\.py",
    "lm_eval": r"eval/standard\.py",
    "datasets": r"eval/standard\.py",
    "jinja2": r"report/.*|data/chat\.py|eval/(standard|tasks/prompt)\.py",
}


def room_of(path: str) -> str:
    """`data/corpus.py` and `data/__init__.py` are in room data, `types.py` in types, `__init__.py` in none ("")."""
    head = path.split("/", 1)[0].removesuffix(".py")
    return "" if head == "__init__" else head


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import at any depth; relative ones keep their leading dots.

    `from a import b` yields both a and a.b, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            if base == PACKAGE:
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node.func) in ("__import__", "import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _called_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(files: dict[str, str]) -> list[str]:
    """Broken rules in `files` (path relative to the package -> source), one sentence each."""
    found = []
    rooms = {room_of(path) for path in files}
    for path, source in sorted(files.items()):
        room = room_of(path)
        if room and room not in MAY_IMPORT:
            found.append(f"{path}: room {room} is not ruled")
            continue
        allowed = MAY_IMPORT[room] if room else set()
        for line, name in imported_modules(source):
            top, _, rest = name.partition(".")
            target = rest.split(".", 1)[0]
            if name.startswith("."):
                found.append(f"{path}:{line}: relative import {name}")
            elif top == PACKAGE and target in rooms | set(MAY_IMPORT) and target != room:
                if allowed is not None and target not in allowed:
                    found.append(f"{path}:{line}: {room or PACKAGE} imports {target}")
            elif top in HEAVY and not re.fullmatch(HEAVY[top], path):
                found.append(f"{path}:{line}: {top} imported outside its files")
    return found


def package_files() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def test_rooms_keep_their_import_directions() -> None:
    assert violations(package_files()) == []


def test_the_rooms_found_are_the_rooms_ruled() -> None:
    assert {room_of(path) for path in package_files()} - {""} == set(MAY_IMPORT)


def test_the_table_has_no_cycle() -> None:
    settled: set[str] = set()
    waiting = {room: allowed for room, allowed in MAY_IMPORT.items() if allowed is not None}
    while ready := [room for room, allowed in waiting.items() if allowed <= settled]:
        settled |= set(ready)
        waiting = {room: allowed for room, allowed in waiting.items() if room not in settled}
    assert not waiting


def test_every_file_opens_with_what_it_is_for() -> None:
    assert [path for path, source in package_files().items() if not ast.get_docstring(ast.parse(source))] == []


def _probe(path: str, source: str) -> list[str]:
    return violations({"types.py": "", "train/loop.py": "", path: source})


def test_probe_a_room_outside_the_row_in_every_spelling() -> None:
    for source in (
        "import ultralong_ray.train.loop",
        "from ultralong_ray.train import loop",
        "from ultralong_ray.train.loop import run",
        "from ultralong_ray import train",
        "from ultralong_ray import types, train as t",
        "import importlib\nimportlib.import_module('ultralong_ray.train.loop')",
    ):
        assert [v for v in _probe("data/pack.py", source) if "data imports train" in v], source


def test_probe_lazy_and_typing_only_imports() -> None:
    lazy = "def f():\n    from ultralong_ray.train import loop\n    return loop"
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ultralong_ray.train import loop"
    assert _probe("data/pack.py", lazy) == ["data/pack.py:2: data imports train"]
    assert _probe("data/pack.py", typing_only) == ["data/pack.py:3: data imports train"]


def test_probe_relative_imports() -> None:
    assert _probe("data/pack.py", "from . import sample") == ["data/pack.py:1: relative import ."]
    assert _probe("data/pack.py", "from ..types import Document") == ["data/pack.py:1: relative import ..types"]


def test_probe_heavy_libraries_outside_their_files() -> None:
    assert _probe("train/loop.py", "import deepspeed") == ["train/loop.py:1: deepspeed imported outside its files"]
    assert _probe("train/engine.py", "import deepspeed.comm, torch") == []
    assert _probe("data/corpus.py", "import ray.data") == ["data/corpus.py:1: ray imported outside its files"]
    assert _probe("data/fan_out.py", "import ray.data") == []
    assert _probe("storage.py", "def f():\n    import torch") == ["storage.py:2: torch imported outside its files"]
    assert _probe("__init__.py", "import torch") == ["__init__.py:1: torch imported outside its files"]


def test_probe_a_new_room_and_a_package_that_imports_its_rooms() -> None:
    assert _probe("utils.py", "") == ["utils.py: room utils is not ruled"]
    assert _probe("__init__.py", "from ultralong_ray.types import Document") == [
        "__init__.py:1: ultralong_ray imports types"
    ]


def test_probe_what_is_allowed_passes() -> None:
    assert _probe("data/pack.py", "from ultralong_ray.types import Document\nfrom ultralong_ray.data import x") == []
    assert _probe("job.py", "from ultralong_ray.train import loop\nimport ray") == []
