"""Predictions against measured steps, against arithmetic, and in the direction in which each must move."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planner.shapes import LLAMA_8B, layout
from ultralong_ray.benchmark.setups import SHAPES, Setup
from ultralong_ray.flops import ModelShape
from ultralong_ray.planner.costs import Costs
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.predict import Prediction, predict
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

H200_X4 = parse_cluster("4xH200")
SMALL = ModelShape(hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1408, vocab=4096)
# The measured runs went through Hugging Face's own modules and DeepSpeed's default buckets, not through this package:
# norms that keep float32 copies, an MLP under autograd, logits in float32.
OTHER_CODE = Costs(
    norm_tensors=5,
    mlp_tile_tensors=7,
    logit_tensors=6,
    gathered_layers=1e9 / LLAMA_8B.layer_parameters,
    reduce_bucket_layers=5e8 / LLAMA_8B.layer_parameters,
    norm_forward=18,
    norm_backward=24,
    swiglu_forward=5,
    swiglu_backward=8,
    logit_passes=12,
)
COMPILE_SECONDS = 7.0  # flash-attn-4 on first use


def made(length: int = 131_072, cluster: str = "4xH200", **changes: object) -> Prediction:
    fields = {"ulysses": 4, **changes}
    return predict(LLAMA_8B, length, layout(**fields), parse_cluster(cluster))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "layers", "first_step", "seconds", "gib"),
    [(131_072, 32, False, 10.8, 62.9), (524_288, 8, False, 30.7, 49.7), (524_288, 32, True, 130.7, 102.0)],
)
def test_measured_steps_of_the_8b_shape_on_four_h200(
    length: int, layers: int, first_step: bool, seconds: float, gib: float
) -> None:
    """flash-attn-4, all kept on the GPU, MLP tiles of 32,768 rows, bfloat16 gradients; the third was a first step."""
    shape = replace(LLAMA_8B, layers=layers)
    plan = layout(layers=layers, mlp_tile=32_768)
    found = predict(shape, length, plan, H200_X4, gradient_bytes=2, first_step=first_step, costs=OTHER_CODE)
    assert found.step_seconds + first_step * COMPILE_SECONDS == pytest.approx(seconds, rel=0.15)
    assert found.memory.allocated_gib == pytest.approx(gib, rel=0.15)


def test_a_measured_step_of_a_small_model_with_heads_of_64_at_1m_on_one_h200() -> None:
    """The 1M extension of jobs/recipes/reproduction: 59.7 s a step, 10 % less at the rates of heads of 128."""
    plan = TrainPlan(1, 1, (LayerKeep(),) * 8, 16_384, 32_768, False)
    found = predict(SMALL, 1_048_576, plan, parse_cluster("1xH200"), zero_stage=1, gradient_bytes=2)
    assert found.step_seconds == pytest.approx(59.7, rel=0.03)
    assert found.memory.allocated_gib == pytest.approx(29.96, rel=0.08)


RESULTS = Path(__file__).resolve().parents[2] / "jobs" / "results"
MEASURED = (
    *(
        "llama31_8b_128k",
        "llama31_8b_256k_offload",
        "llama31_8b_512k",
        "llama31_8b_degrees_256k",
        "llama31_8b_layer_1m",
    ),
    *("llama31_8b_1m_8layers", "llama31_8b_1m_16layers", "llama32_1b_layer_4m"),
)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_steps_of_this_code_on_two_h200(name: str) -> None:
    """Time within 10 %, memory within 8 %. What these runs did decide: which tensors are alive at once in attention's
    backward, and that heads of 64 do not slow down over minutes."""
    result = json.loads((RESULTS / f"{name}_2xh200.json").read_text())
    for run in result["runs"]:
        if run["contestant"] != "ours":
            continue
        setup = Setup(**run["setup"])
        shape = ModelShape.from_config({**SHAPES[result["shape"]], "num_hidden_layers": setup.layers})
        is_first = "check" in run or not run["warmup_seconds"]
        found = predict(
            shape, setup.length, setup.plan, parse_cluster("2xH200"), kernel=run["kernel"], first_step=is_first
        )
        at_4m = setup.length > 2**20  # rates there are those of heads of 128 on an H100
        assert found.step_seconds == pytest.approx(run["median_step_seconds"], rel=0.16 if at_4m else 0.1), setup
        measured = max(run["by_rank"]["peak_gpu_gib"])
        if name == "llama31_8b_1m_16layers":  # by arithmetic: a layer's copies, then held to the end (since mended)
            measured -= 8.06
        assert found.memory.allocated_gib == pytest.approx(measured, rel=0.08), setup


SMALL_RUNS = json.loads((RESULTS / "planner_of_the_reproduction_2xh200.json").read_text())["runs"]


@pytest.mark.parametrize("run", SMALL_RUNS, ids=lambda run: run["run"])
def test_measured_trainings_of_a_small_model_on_two_h200(run: dict[str, Any]) -> None:
    """Whole trainings by jobs/pretrain.py and jobs/sft.py, from steps of a tenth of a second to half a minute."""
    setup = run["setup"]
    keep = (LayerKeep(),) * 8 if setup["keeps_layer_inputs_and_attention"] else ()
    plan = TrainPlan(setup["ulysses_degree"], 1, keep, 16_384, 32_768, False)
    fields = {name: setup[name] for name in ("micro_batch_sequences", "global_batch_sequences")}
    fields |= {"zero_stage": 1, "gradient_bytes": 2}
    found = predict(SMALL, setup["sequence_length"], plan, parse_cluster("2xH200"), kernel="flash_attn_4", **fields)
    assert found.step_seconds == pytest.approx(run["step_seconds_measured_median"], rel=0.1)
    assert found.memory.allocated_gib == pytest.approx(run["peak_gib_measured"], rel=0.08)


def test_states_and_kept_tensors_by_hand() -> None:
    parts = made().memory.peak[1]
    parameters, rows, gib = LLAMA_8B.parameters / 4, 131_072 / 4, 2**30
    assert parts["weights"] == pytest.approx(2 * parameters / gib)
    assert parts["float32 weights"] == parts["gradients"] == pytest.approx(4 * parameters / gib)
    assert parts["Adam moments"] == pytest.approx(8 * parameters / gib)
    assert parts["kept inputs"] == pytest.approx(32 * rows * 8192 / gib)
    assert parts["kept attention"] == pytest.approx(32 * rows * (8192 + 128) / gib)


def test_attention_time_by_hand() -> None:
    found = made()
    forward = 32 * 2 * 4096 * 131_072**2 / 4
    assert found.time["attention forward"] == pytest.approx(forward / (0.93 * 699e12))
    assert found.time["attention backward"] == pytest.approx(2.5 * forward / (0.93 * 638e12))
    assert "attention again" not in found.time


def test_more_tokens_take_more_of_everything() -> None:
    runs = [made(length) for length in (65_536, 131_072, 262_144, 524_288, 1_048_576)]
    assert all(a.memory.gib < b.memory.gib for a, b in itertools.pairwise(runs))
    assert all(a.step_seconds < b.step_seconds for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (2, 2), (1, 4)])
def test_more_rows_kept_take_less_time_and_more_memory(ulysses: int, ring: int) -> None:
    keeps = [LayerKeep(attention_rows=rows) for rows in (0.0, 0.25, 0.5, 0.75, 1.0)]
    runs = [made(524_288, ulysses=ulysses, ring=ring, keep=keep) for keep in keeps]
    assert all(a.step_seconds > b.step_seconds for a, b in itertools.pairwise(runs))
    kept = [run.memory.peak[1].get("kept attention", 0.0) for run in runs]
    assert kept == sorted(kept) and kept[0] == 0
    assert all(a.memory.gib < b.memory.gib for a, b in itertools.pairwise(runs))
    assert runs[-1].flops.model_flops_causal == runs[0].flops.model_flops_causal


def test_half_the_rows_save_three_quarters_of_the_replay() -> None:
    none, half = (made(524_288, keep=LayerKeep(attention_rows=rows)).time["attention again"] for rows in (0.0, 0.5))
    assert half == pytest.approx(none / 4)


def test_a_ring_waits_for_its_slowest_rank() -> None:
    """Half the rows kept: the last of four ranks computes 3.5 of its 8 chunk squares again, their mean is 2."""
    none, half = (
        made(524_288, ulysses=1, ring=4, keep=LayerKeep(attention_rows=rows)).time["attention again"]
        for rows in (0.0, 0.5)
    )
    assert half / none == pytest.approx(3.5 / 8)


def test_the_host_takes_what_the_gpu_gives_up() -> None:
    device, host = made(524_288), made(524_288, keep=LayerKeep("host", "host"))
    moved = host.memory.host_gib - device.memory.host_gib
    assert moved == pytest.approx(device.memory.peak[1]["kept inputs"] + device.memory.peak[1]["kept attention"])
    assert "kept inputs" not in host.memory.peak[1] and "kept attention" not in host.memory.peak[1]
    assert host.memory.gib < device.memory.gib - 0.9 * moved  # two layers stay, on their way
    assert "host transfer not hidden" not in host.time  # at 512K a layer computes far longer than it copies


def test_what_comes_back_from_the_host_comes_when_the_layers_kept_on_the_gpu_are_done() -> None:
    def peak(device_layers: int) -> dict[str, float]:
        keep = (LayerKeep("host", "host"),) * (32 - device_layers) + (LayerKeep(),) * device_layers
        return predict(LLAMA_8B, 524_288, replace(layout(), keep=keep), H200_X4).memory.peak[1]

    none, one, eight = peak(0), peak(1), peak(8)
    layer = (made(524_288).memory.peak[1]["kept inputs"] + made(524_288).memory.peak[1]["kept attention"]) / 32
    assert none["fetched from the host"] == pytest.approx(2 * layer) and "kept inputs" not in none
    assert one == none  # the last layer's and the next one's, or two that were fetched: as much
    assert eight["kept inputs"] + eight["kept attention"] == pytest.approx(8 * layer)
    assert "fetched from the host" not in eight


def test_a_link_slower_than_the_layer_is_waited_for() -> None:
    slow = replace(H200_X4, gpu=replace(H200_X4.gpu, pcie_gbytes_per_second=2.0))
    plan = layout(keep=LayerKeep("host", "host"))
    short, long = (predict(LLAMA_8B, length, plan, slow).time for length in (32_768, 4_194_304))
    assert short["host transfer not hidden"] > 0 and "host transfer not hidden" not in long


def test_offload_moves_optimizer_states_and_gradients() -> None:
    kept, moved = made(), made(offload=True)
    states = LLAMA_8B.parameters / 4 * 16 / 2**30
    assert moved.memory.host["optimizer"] == pytest.approx(states)
    assert kept.memory.allocated_gib - moved.memory.allocated_gib == pytest.approx(states)
    assert moved.time["optimizer"] > 10 * kept.time["optimizer"]


def test_bfloat16_gradients_are_whole_below_stage_2_and_float32_where_they_update() -> None:
    """DeepSpeed 0.19.8, stage_1_and_2.py: a rank's part is made float32 at once, and is float32 on the host."""
    kept, moved = (
        predict(LLAMA_8B, 131_072, layout(offload=offload), H200_X4, zero_stage=1, gradient_bytes=2).memory
        for offload in (False, True)
    )
    update = dict(kept.phases)["optimizer"]
    assert update["gradients"] == pytest.approx(2 * LLAMA_8B.parameters / 2**30)
    assert update["float32 gradients"] == pytest.approx(4 * LLAMA_8B.parameters / 4 / 2**30)
    assert moved.host["optimizer"] == pytest.approx((4 + 8 + 4) * LLAMA_8B.parameters / 4 / 2**30)


def test_a_network_slower_than_nvlink_is_felt() -> None:
    inside, across = made(ulysses=8, cluster="1x8xH100"), made(ulysses=8, cluster="2x4xH100")
    assert across.time["Ulysses exchange"] > 3 * inside.time["Ulysses exchange"]


def test_repeated_key_value_heads_cost_traffic_and_memory() -> None:
    eight, sixteen = (made(ulysses=ulysses, cluster="1x32xH100", length=2**20) for ulysses in (8, 16))
    names = ("layer's query, key, value", "kept inputs")
    grown, same = (
        sixteen.memory.peak[1][name] * 16 / (eight.memory.peak[1][name] * 8) for name in names
    )  # per row: (32 + 2 * 16) heads instead of (32 + 2 * 8)
    assert grown == pytest.approx(64 / 48) and same == pytest.approx(1)


def test_a_ring_holds_float32_sums_and_is_slower_than_ulysses_on_nvlink() -> None:
    ring, ulysses = made(262_144, ulysses=1, ring=4), made(262_144)
    names = dict(ring.memory.phases)["backward of attention"]
    assert names["ring buffers"] > 0 and "ring buffers" not in dict(ulysses.memory.phases)["backward of attention"]
    assert ulysses.step_seconds < ring.step_seconds < 1.12 * ulysses.step_seconds


def test_without_replay_everything_is_kept() -> None:
    plan = replace(layout(), keep=())
    found = predict(LLAMA_8B, 32_768, plan, H200_X4)
    replayed = predict(LLAMA_8B, 32_768, layout(), H200_X4)
    assert found.memory.gib > replayed.memory.gib and found.step_seconds < replayed.step_seconds


def test_a_batch_is_passes_of_a_step() -> None:
    one, four = (predict(LLAMA_8B, 131_072, layout(), H200_X4, global_batch_sequences=batch) for batch in (1, 4))
    assert four.work.accumulation == 4 and four.memory.gib == one.memory.gib
    assert four.step_seconds == pytest.approx(4 * one.step_seconds, rel=0.01)
    assert four.mfu == pytest.approx(one.mfu, rel=0.01)


@pytest.mark.parametrize(
    ("plan", "kernel", "words"),
    [
        (layout(ulysses=8), "auto", "4 GPUs cannot form groups of 8"),
        (layout(layers=8), "auto", "keeps 8 layers, the model has 32"),
        (layout(), "math", "no speed is known"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: object, kernel: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(LLAMA_8B, 131_072, plan, H200_X4, kernel=kernel)  # type: ignore[arg-type]
