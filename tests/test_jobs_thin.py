"""jobs/ are commands: read the arguments, make one call, say where the result is. Logic lives in the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

JOBS = Path(__file__).resolve().parents[1] / "jobs"
MAX_LINES = 60


def faults(files: dict[str, str]) -> list[str]:
    """Broken rules in `files` (file name -> source): too long, a class, an import of another job."""
    names = {name.removesuffix(".py") for name in files}
    found = []
    for name, source in sorted(files.items()):
        if (num_lines := len(source.splitlines())) > MAX_LINES:
            found.append(f"{name}: {num_lines} lines, at most {MAX_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.append(f"{name}: class {node.name}")
            others = [module for module in _imported(node) if module.removeprefix("jobs.").split(".")[0] in names]
            found += [f"{name}: imports job {module}" for module in others]
    return found


def _imported(node: ast.AST) -> list[str]:
    """Modules of one import statement, relative ones without their dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        from_jobs = node.module == "jobs" or (node.level > 0 and not node.module)
        return [alias.name for alias in node.names] if from_jobs else [node.module or ""]
    return []


def test_jobs_are_thin() -> None:
    files = {path.name: path.read_text() for path in sorted(JOBS.glob("*.py"))}
    assert files and faults(files) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("pass\n" * 61, "a.py: 61 lines, at most 60"),
        ("def f():\n    class Options:\n        pass\n", "a.py: class Options"),
        ("import b\n", "a.py: imports job b"),
        ("from b import main\n", "a.py: imports job b"),
        ("from jobs import b\n", "a.py: imports job b"),
        ("from jobs.b import main\n", "a.py: imports job jobs.b"),
        ("def f():\n    from . import b\n", "a.py: imports job b"),
        ("from .b import main\n", "a.py: imports job b"),
    ],
)
def test_probe_each_fault_is_seen(source: str, fault: str) -> None:
    assert faults({"a.py": source, "b.py": ""}) == [fault]


def test_probe_a_thin_job_passes() -> None:
    job = "import sys\nfrom ultralong_ray.b import run\n\nif __name__ == '__main__':\n    sys.exit(run())\n"
    assert faults({"a.py": job + "\n" * 55, "b.py": job}) == []
