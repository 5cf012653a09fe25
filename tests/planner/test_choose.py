"""What is chosen for the shipped recipes, and that what is given stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.planner.shapes import LLAMA_8B, llama_recipe
from ultralong_ray.parallel.kernels import cudnn, flash_attn_3, flash_attn_4
from ultralong_ray.parallel.kernels.kernel import Setting
from ultralong_ray.planner.choose import fastest, fit, legal
from ultralong_ray.planner.hardware import GPUS, GPUS_REFUSED_BY, parse_cluster
from ultralong_ray.planner.plan import Planned, hardware_of, plan_training
from ultralong_ray.planner.predict import Prediction
from ultralong_ray.planner.section import section_of
from ultralong_ray.types import LayerKeep, UserError


def planned(tag: str, cluster: str, *overrides: str) -> Planned:
    return plan_training(llama_recipe(tag, *overrides), "pretrain", parse_cluster(cluster))


def predicted(tag: str, cluster: str, *overrides: str) -> Prediction:
    prediction = planned(tag, cluster, *overrides).prediction
    assert prediction is not None
    return prediction


@pytest.mark.parametrize("tag", ["1m", "2m", "4m"])
@pytest.mark.parametrize("cluster", ["8xH100", "4x8xH100", "32x8xH100"])
def test_the_shipped_recipes_fit_on_8_32_and_256_h100(tag: str, cluster: str) -> None:
    best = predicted(tag, cluster)
    plan, work = best.work.plan, best.work
    assert best.memory.gib <= 0.95 * 79.1 and best.memory.host_node_gib <= 0.9 * 2048
    assert plan.degree * work.data_parallel == work.hardware.num_gpus
    assert work.data_parallel * work.accumulation == work.global_batch_sequences
    assert work.sequence_length % (2 * plan.ring_degree * plan.ulysses_degree) == 0
    assert 0.35 < best.mfu < 0.56


def test_ulysses_inside_a_node_and_a_ring_beyond() -> None:
    """4M on 256 GPUs with a batch of 2: 128 ranks share a sequence, more than the model has heads."""
    assert predicted("1m", "8xH100").work.plan.ring_degree == 1
    plan = predicted("4m", "32x8xH100").work.plan
    assert (plan.ulysses_degree, plan.ring_degree) == (8, 16)


def test_the_gpu_is_filled_before_the_host_and_the_host_before_rows_go() -> None:
    roomy, filled, dropped = predicted("1m", "8xH200"), predicted("1m", "8xH100"), predicted("4m", "8xH100")
    assert set(roomy.work.plan.keep) == {LayerKeep()}
    places = [layer.inputs for layer in filled.work.plan.keep]
    assert places == sorted(places, reverse=True) and set(places) == {"host", "device"}  # the last layers stay
    assert {layer.attention_rows for layer in filled.work.plan.keep} == {1.0}
    assert dropped.work.plan.keep[0].attention_rows < 1
    assert "attention again" in dropped.time and "attention again" not in filled.time


def test_one_layer_more_on_the_gpu_would_not_fit() -> None:
    best = predicted("1m", "8xH100")
    keep = list(best.work.plan.keep)
    keep[[layer.inputs for layer in keep].index("device") - 1] = LayerKeep()
    from ultralong_ray.planner.predict import predict_work

    more = predict_work(replace(best.work, plan=replace(best.work.plan, keep=tuple(keep))))
    assert not more.fits_device


def test_nothing_legal_is_faster_than_what_is_chosen() -> None:
    hardware = parse_cluster("8xH100")
    section = section_of(llama_recipe("1m"), "pretrain")
    best = fastest(section, hardware)
    assert best is not None
    others = [fit(section, hardware, pair, False) for pair in legal(section, 8)]
    assert best.step_seconds <= 1.003 * min(other.step_seconds for other in others if other is not None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ulysses_degree", 4),
        ("ring_degree", 2),
        ("sequence_parallel_degree", 4),
        ("keep_inputs", "host"),
        ("keep_attention", "host"),
        ("keep_attention_rows", 0.5),
        ("offload_optimizer", True),
        ("mlp_tile_tokens", 4096),
        ("loss_tile_tokens", 777),
    ],
)
def test_given_fields_are_kept(field: str, value: object) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    made = planned("1m", "8xH100", f"pretrain.{field}={text}")
    plan = made.plan
    facts = {
        "ulysses_degree": plan.ulysses_degree,
        "ring_degree": plan.ring_degree,
        "sequence_parallel_degree": plan.degree,
        "keep_inputs": plan.keep[0].inputs if len({layer.inputs for layer in plan.keep}) == 1 else None,
        "keep_attention": plan.keep[0].attention if len({layer.attention for layer in plan.keep}) == 1 else None,
        "keep_attention_rows": plan.keep[0].attention_rows,
        "offload_optimizer": plan.offload_optimizer,
        "mlp_tile_tokens": plan.mlp_tile_tokens,
        "loss_tile_tokens": plan.loss_tile_tokens,
    }
    assert facts[field] == value
    assert field in made.section.given


def test_a_given_kernel_sets_the_speed() -> None:
    best, slow = predicted("1m", "8xH100"), predicted("1m", "8xH100", "pretrain.attention=flash_attn_2")
    assert slow.step_seconds > 1.5 * best.step_seconds
    assert predicted("1m", "8xA100").work.kernel == "flash_attn_2"


def test_larger_groups_come_first_and_masked_documents_take_no_ring() -> None:
    section = section_of(llama_recipe("1m", "pretrain.sequence_parallel_degree=auto"), "pretrain", LLAMA_8B)
    assert legal(section, 4)[:4] == [(4, 1), (2, 2), (1, 4), (2, 1)]
    assert {ring for _, ring in legal(section.changed(mask_documents=True), 4)} == {1}
    assert legal(section, 64)[0] == (32, 2)


def test_on_cpus_everything_stays_and_nothing_is_predicted() -> None:
    made = plan_training(llama_recipe("1m", "cluster.gpus_per_worker=0"), "pretrain", None)
    assert made.prediction is None and made.notes == ()
    assert (made.plan.ulysses_degree, made.plan.ring_degree) == (8, 1)
    assert made.plan.keep == (LayerKeep(),) * 32
    assert (made.plan.mlp_tile_tokens, made.plan.loss_tile_tokens) == (16_384, 2_048)


def test_an_unknown_gpu_or_kernel_is_said() -> None:
    made = plan_training(llama_recipe("1m"), "pretrain", None)
    assert made.prediction is None and "give cluster.gpu" in made.notes[0]
    math = planned("1m", "8xH100", "pretrain.attention=math")
    assert math.prediction is None and '"math"' in math.notes[0]
    named = plan_training(llama_recipe("1m", "cluster.gpu=A100-40GB"), "pretrain", None)
    assert "cluster.gpu 'A100-40GB' is not in the planner's table" in named.notes[0]
    wide = planned("1m", "32xH200", "pretrain.precision=float32")
    assert any('pretrain.precision = "float32"' in note and "much longer" in note for note in wide.notes)
    assert not any("is assumed" in note for note in wide.notes)


def test_kernels_are_refused_where_they_say_they_do_not_run() -> None:
    capabilities = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}
    assert capabilities.keys() == GPUS.keys()
    for kernel, room in (("flash_attn_4", flash_attn_4), ("flash_attn_3", flash_attn_3), ("cudnn", cudnn)):
        for gpu, capability in capabilities.items():
            said = room.refusal(Setting("cuda", capability, torch.bfloat16, 128)) or ""
            assert ("needs sm_" in said) == (gpu in GPUS_REFUSED_BY[kernel]), f"{kernel} on {gpu}: {said}"
    with pytest.raises(UserError, match=r'pretrain.attention = "flash_attn_3" does not run on cluster.gpu B200'):
        planned("1m", "8xB200", "pretrain.attention=flash_attn_3")


def test_the_cluster_of_a_recipe() -> None:
    recipe = llama_recipe("4m", "cluster.gpu=H200", "cluster.gpus_per_node=4", "cluster.host_memory_gib_per_node=500")
    hardware = hardware_of(recipe)
    assert hardware is not None
    assert (hardware.num_gpus, hardware.num_nodes, hardware.host_memory_gib_per_node) == (32, 8, 500)
    assert hardware_of(llama_recipe("4m", "cluster.gpu=null")) is None
    found = hardware_of(llama_recipe("4m", "cluster.gpu=null"), "A100-80G", 333.0)
    assert found is not None and (found.gpu.name, found.host_memory_gib_per_node) == ("A100", 333)
    assert hardware_of(llama_recipe("4m", "cluster.gpus_per_worker=0", "cluster.gpu=H100")) is None


def test_a_model_without_a_shape_is_asked_for_one() -> None:
    recipe = llama_recipe("1m").model_copy(deep=True)
    bare = recipe.model_copy(update={"model": recipe.model.model_copy(update={"architecture": None})})
    with pytest.raises(UserError, match=r"give \[model.architecture\]"):
        plan_training(bare, "pretrain", parse_cluster("8xH100"))
    assert plan_training(bare, "pretrain", parse_cluster("8xH100"), LLAMA_8B).prediction is not None
