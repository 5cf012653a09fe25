"""What a user reads: the job's output and exit statuses, and the JSON beside a training stage."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.planner.shapes import FREE, ROOT, llama_recipe
from ultralong_ray.plan import check_base_model, describe, num_steps_known, plan_stages
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.plan import Planned, as_json, plan_training
from ultralong_ray.planner.words import describe_plan, keep_words
from ultralong_ray.recipe import load_recipe
from ultralong_ray.types import LayerKeep, UserError


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "jobs/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_the_job_prints_every_stage_and_exits_0() -> None:
    done = run_job("jobs/recipes/llama31_8b_1m.toml", "--cluster", "8xH100", *FREE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GPU memory") == 2
    for fact in ("pretrain: 1,048,576 tokens, batch 8", "Ulysses 8 x ring 1", "125 steps:", "GPU-hours", "sft: 8,192"):
        assert fact in done.stdout


def test_the_job_refuses_with_words_and_exits_2() -> None:
    done = run_job("jobs/recipes/llama31_8b_4m.toml", "--cluster", "4xH200", "--json", *FREE)
    assert done.returncode == 2
    assert "error: pretrain cannot run on 4 x H200" in done.stderr and "smallest change that fits" in done.stderr
    assert "Traceback" not in done.stderr
    sft, refusal = json.loads(done.stdout)
    assert sft["prediction"]["device_gib"] < 0.95 * 139.8 and "4 x H200" in refusal["refused"]


def test_the_job_explains_arguments_it_cannot_use() -> None:
    done = run_job("jobs/recipes/llama31_8b_1m.toml", "--host-memory-gib", "500")
    assert done.returncode == 2 and "give one, as in 4xH200" in done.stderr


def test_degrees_are_held_against_the_cluster_that_is_asked_about() -> None:
    """The recipe's own cluster has 32 workers, which no group of 128 divides."""
    degrees = ("--pretrain.ulysses_degree", "8", "--pretrain.ring_degree", "16")
    done = run_job("jobs/recipes/llama31_8b_4m.toml", "--cluster", "16x8xH100", *degrees)
    assert done.returncode == 0, done.stderr
    assert "Ulysses 8 x ring 16 x data-parallel 1" in done.stdout
    done = run_job("jobs/recipes/llama31_8b_4m.toml", "--cluster", "3xH100", *degrees)
    assert done.returncode == 2 and "cluster.num_workers 3 is not a multiple of" in done.stderr


@pytest.mark.parametrize("numbers", [(0.0, None), (-5.0, None), (None, 0.0), (None, math.nan)])
def test_a_node_without_memory_or_network_is_refused(numbers: tuple[float | None, float | None]) -> None:
    with pytest.raises(UserError, match="is not a size; give a number above 0"):
        parse_cluster("4xH200", *numbers)


def test_a_range_of_workers_is_planned_at_the_most_that_fill_groups() -> None:
    workers = ("cluster.num_workers=5", "cluster.min_workers=2", "pretrain.sequence_parallel_degree=2")
    recipe = load_recipe("jobs/recipes/quickstart.toml", [*workers, "--workdir", "/nowhere"])
    check_base_model(recipe)
    assert [o.plan.degree for o in plan_stages(recipe) if isinstance(o, Planned)] == [2, 2]
    assert "4 workers = 2 data-parallel x 2 Ulysses x 1 ring" in describe(recipe)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_base_without_a_config_that_can_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    recipe = load_recipe("jobs/recipes/quickstart.toml", ["--model.base", str(tmp_path)])
    for plan in (check_base_model, plan_stages, describe):
        with pytest.raises(UserError, match=r"model.base: .*/config.json describes no Llama-class model"):
            plan(recipe)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window 32 limits"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config gptq"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5}}, "has no factor"),
        ({"max_position_embeddings": 256}, "original_context_length 512 is beyond max_position_embeddings 256"),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, None),
    ],
)
def test_a_base_that_cannot_be_extended_is_refused_before_anything_starts(
    fields: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    written = json.loads((ROOT / "jobs/models/tiny-512/config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(written))
    recipe = load_recipe("jobs/recipes/quickstart.toml", ["--model.base", str(tmp_path)])
    if words is None:
        check_base_model(recipe)
        return
    with pytest.raises(UserError, match=words):
        check_base_model(recipe)


def test_parts_add_up_to_what_is_printed() -> None:
    planned = plan_training(llama_recipe("1m"), "pretrain", parse_cluster("8xH100"))
    prediction = planned.prediction
    assert prediction is not None
    values = as_json(planned)["prediction"]
    assert abs(sum(values["device_parts_gib"].values()) - values["device_gib"]) < 1e-6
    assert abs(sum(values["step_parts_seconds"].values()) - values["step_seconds"]) < 1e-6
    assert abs(sum(values["host_parts_gib"].values()) - values["host_rank_gib"]) < 1e-6
    text = describe_plan(planned, 125)
    assert f"{prediction.memory.gib:.1f} GiB per rank" in text and f"{prediction.mfu:.1%}" in text
    hours = 125 * prediction.step_seconds / 3600
    assert f"{hours:,.1f} hours, {8 * hours:,.0f} GPU-hours" in text
    assert "causal" in text and "hardware" in text and "ALST-style" in text
    json.dumps(as_json(planned))


def test_layers_alike_are_named_together() -> None:
    keep = (LayerKeep("host", "host", 0.5),) * 3 + (LayerKeep(),) * 2 + (LayerKeep(attention_rows=0),)
    assert keep_words(keep) == (
        "layers 0-2 inputs and attention (last 0.5 of the rows) on the host; layers 3-4 inputs and attention on the "
        "device; layers 5-5 inputs on the device, attention computed again"
    )
    assert "autograd" in keep_words(())


def test_the_dry_run_shows_layout_and_prediction() -> None:
    text = describe(llama_recipe("1m", "cluster.gpu=H100", "--workdir", "/nowhere"))
    assert "8 workers = 1 data-parallel x 8" in text
    assert "predicted" in text and "s per step, MFU" in text
    impossible = ("cluster.gpu=H100", "pretrain.gradient_checkpointing=false", "--workdir", "/nowhere")
    refused = describe(llama_recipe("1m", *impossible))
    assert "layout    pretrain cannot run on 8 x H100" in refused


def test_a_warm_up_that_the_run_does_not_end_is_said() -> None:
    given = ["--pretrain.learning_rate", "1e-3", "--pretrain.steps", "8", "--workdir", "/nowhere"]
    text = describe(load_recipe("jobs/recipes/quickstart.toml", [*given, "--pretrain.warmup_steps", "20"]))
    assert "  note      pretrain.warmup_steps 20 is more than the 8 steps: the learning rate ends at 0.0004" in text
    assert "warmup_steps 8 is" not in describe(
        load_recipe("jobs/recipes/quickstart.toml", [*given, "--pretrain.warmup_steps", "8"])
    )


def test_stages_are_planned_one_by_one() -> None:
    outcomes = plan_stages(llama_recipe("4m"), parse_cluster("4xH200"))
    assert isinstance(outcomes[0], UserError) and not isinstance(outcomes[1], UserError)
    assert num_steps_known(llama_recipe("4m"), "pretrain") == 150
    assert num_steps_known(llama_recipe("4m"), "sft") is None
