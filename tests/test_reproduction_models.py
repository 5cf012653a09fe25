"""The models of jobs/models that the reproduction made: what extension did to a window, asked of them here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.passkey import build_prompt, is_right

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "jobs" / "models"
LENGTH_TOKENS = 12_288  # three times the base model's window


def finds_its_key(name: str) -> bool:
    """A pass key at 40 % of LENGTH_TOKENS."""
    engine = Engine(MODELS / name, precision="float32", prefill_chunk_tokens=2048, device="cpu")
    place = {"context_length_tokens": LENGTH_TOKENS, "depth_percent": 40, "sample": 0, "seed": 5}
    prompt = build_prompt(engine.tokenizer, max_new_tokens=16, chat_template=True, **place)
    return is_right(engine.answer(prompt.ids, 16), prompt.expected)


@pytest.mark.slow
def test_the_extended_models_see_beyond_the_window_of_their_base() -> None:
    assert not finds_its_key("reproduction-base")
    assert finds_its_key("reproduction-1m-pretrained")
    assert finds_its_key("reproduction-1m")
    assert finds_its_key("reproduction-1m-from-start")


@pytest.mark.parametrize("name", ["reproduction-1m", "reproduction-1m-pretrained", "reproduction-1m-from-start"])
def test_their_window_is_1m_tokens(name: str) -> None:
    config = json.loads((MODELS / name / "config.json").read_text())
    assert config["max_position_embeddings"] == 1048576 + 24576
    assert config["rope_parameters"]["factor"] == 256.0


def test_the_script_of_ten_lines_gets_its_key() -> None:
    script = [sys.executable, "jobs/recipes/reproduction/ask.py", "jobs/models/reproduction-1m", "25"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    asked = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert asked.stdout.splitlines() == ["2300 tokens", "The pass key is 71432."], asked.stderr
