"""What the planner counts against what the code that it speaks about really holds."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from tests.parallel.spawn import section
from tests.planner.shapes import layout, llama_recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.parallel import loss
from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.elementwise import cross_entropy_
from ultralong_ray.parallel.kernels import sdpa_flash
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.parallel.norm import install_fused_norms
from ultralong_ray.parallel.ulysses import ATTENTION_NAME, register_attention
from ultralong_ray.planner.choose import workload
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.memory import Parts
from ultralong_ray.planner.predict import predict
from ultralong_ray.planner.section import section_of
from ultralong_ray.planner.workload import GIB
from ultralong_ray.types import TrainPlan

H200 = parse_cluster("1xH200")
ROWS = 96
ONE_LAYER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
PRECISIONS: list[tuple[Literal["bfloat16", "float32"], int]] = [("bfloat16", 2), ("float32", 4)]
REPLAYED = TrainPlan(1, 1, layout(layers=1).keep, 64, 64, False)
UNREPLAYED = TrainPlan(1, 1, (), 64, 64, False)


def saved_bytes(model_type: str, dtype: torch.dtype) -> int:
    """What autograd keeps of one layer's forward pass besides the weights, every storage counted once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    shape = AutoConfig.for_model(model_type=model_type, **ONE_LAYER)
    model: Any = AutoModelForCausalLM.from_config(shape, attn_implementation=ATTENTION_NAME, dtype=dtype)
    install_fused_norms(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = AttentionContext(SequenceMesh(), sdpa_flash.load())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.zeros(1, ROWS, dtype=torch.long), use_cache=False, attention_context=context)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def planned_bytes(model_type: str, plan: TrainPlan, element_bytes: int, moment: str) -> Parts:
    shape = ModelShape.from_config({**ONE_LAYER, "model_type": model_type})
    memory = predict(shape, ROWS, plan, H200, zero_stage=0, element_bytes=element_bytes).memory
    return {name: size * GIB for name, size in dict(memory.phases)[moment].items()}


@pytest.mark.parametrize(("precision", "element_bytes"), PRECISIONS)
@pytest.mark.parametrize(
    ("plan", "moment", "part"),
    [
        (REPLAYED, "backward of attention", "layer's query and key norms"),
        (REPLAYED, "backward of an MLP", "layer's query and key norms"),
        (UNREPLAYED, "loss", "kept by autograd"),
    ],
)
def test_norms_of_queries_and_keys_leave_what_is_counted(
    plan: TrainPlan, moment: str, part: str, precision: str, element_bytes: int
) -> None:
    dtype = getattr(torch, precision)
    llama, qwen3 = (planned_bytes(model_type, plan, element_bytes, moment) for model_type in ("llama", "qwen3"))
    measured = saved_bytes("qwen3", dtype) - saved_bytes("llama", dtype)
    assert measured > 0
    assert qwen3.get(part, 0.0) - llama.get(part, 0.0) == pytest.approx(measured)


@pytest.mark.parametrize(("precision", "element_bytes"), PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage_and_gradients_are_those_that_deepspeed_is_told(
    stage: int, precision: str, element_bytes: int
) -> None:
    """Without grad_accum_dtype DeepSpeed sums gradients in the weights' own type."""
    from ultralong_ray.train.engine import deepspeed_config

    told = deepspeed_config(section(zero_stage=stage, precision=precision), 4, 1)
    fields = (f"pretrain.zero_stage={stage}", f"pretrain.precision={precision}")
    asked = section_of(llama_recipe("1m", *fields), "pretrain")
    work = workload(asked, parse_cluster("4xH200"), layout())
    assert work.zero_stage == told["zero_optimization"]["stage"]
    assert work.gradient_bytes == (4 if "data_types" in told else element_bytes)


@pytest.mark.parametrize(("precision", "element_bytes"), PRECISIONS)
def test_logits_are_of_the_type_that_is_counted(
    precision: str, element_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[int] = []

    def measured(logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        tiles.append(logits.nbytes)
        return cross_entropy_(logits, *others)

    monkeypatch.setattr(loss, "cross_entropy_", measured)
    hidden, weight = (torch.ones(rows, 64, dtype=getattr(torch, precision)) for rows in (64, ONE_LAYER["vocab_size"]))
    loss.tiled_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.long), torch.ones(64), 64)
    assert tiles == [planned_bytes("llama", REPLAYED, element_bytes, "loss")["logits of a tile"]]
