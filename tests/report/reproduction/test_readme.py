"""The README's section on the reproduction says what jobs/results/reproduction.json says, and shows figures of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.report.reproduction.command import figures_command

ROOT = Path(__file__).resolve().parents[3]
HEADING = "## The paper's claims, asked of a small model\n"


@pytest.fixture(scope="module")
def section() -> str:
    return (ROOT / "README.md").read_text().split(HEADING)[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return json.loads((ROOT / "jobs/results/reproduction.json").read_text())["tables"]


def test_it_is_short_and_shows_three_figures_that_exist(section: str) -> None:
    shown = re.findall(r"!\[.+\]\((.+\.svg)\)", section)
    assert len(section.splitlines()) <= 40 and len(shown) == 3
    assert all((ROOT / file).is_file() for file in shown)


def test_the_cells_are_those_that_were_counted(section: str, tables: dict[str, Any]) -> None:
    assert sorted(re.findall(r"\d+ of 400", section)) == sorted(re.findall(r"\d+ of 400", tables["passkey"]))


def test_every_share_and_hour_is_in_a_table(section: str, tables: dict[str, Any]) -> None:
    measured = {float(number) for text in tables.values() for number in re.findall(r"\d+\.\d+", text)}
    said = [float(number) for number in re.findall(r"(\d+\.\d+)\s+(?:to|%)", section)]
    assert len(said) >= 3 and set(said) <= measured
    hours = sum(map(float, re.findall(r"on \d+ GPUs?, (\d+\.\d+) GPU-hours", tables["gpu_time"])))
    assert f"{hours:.2f} GPU-hours" in section


def test_the_figures_are_those_of_the_results(tmp_path: Path, section: str) -> None:
    assert figures_command(["--results", str(ROOT / "jobs/results"), "--out", str(tmp_path)]) == 0
    for file in re.findall(r"\((jobs/results/figures/.+\.svg)\)", section):
        assert (tmp_path / Path(file).name).read_text() == (ROOT / file).read_text(), f"run jobs/figures.py: {file}"
