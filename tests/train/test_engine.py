"""Under ZeRO-3 a layer is gathered and reduced as a whole, and what waits on the host changes no step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.spawn import model_config, plan, run_distributed, section
from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.storage import Location
from ultralong_ray.train import engine as engine_module
from ultralong_ray.train.weights import build_model
from ultralong_ray.types import LayerKeep

# As in a real model, the embedding is larger than a layer and a norm much smaller.
VOCAB, HIDDEN = 512, 32
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * 48


def steps_of(model: Location) -> dict[bool, list[tuple[float, list[str]]]]:
    """Three steps with all on the device (False), and with optimizer and activations on the host: loss and messages."""
    import deepspeed.runtime.zero.partition_parameters as partitioning
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    engine_module.PERSISTENT_ELEMENTS = HIDDEN
    engine_module.init_distributed(torch.device("cpu"))
    messages: list[str] = []
    reduction = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    gather, reduce = partitioning._dist_allgather_fn, getattr(Stage3, reduction)

    def counted_gather(part: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        messages.append(f"gather {part.numel() * 2}")
        return gather(part, *rest, **kwargs)

    def counted_reduce(self: Any, parameters: list[Any], *rest: Any) -> Any:
        messages.append(f"reduce {sum(parameter.ds_numel for parameter in parameters)}")
        return reduce(self, parameters, *rest)

    partitioning._dist_allgather_fn = counted_gather
    setattr(Stage3, reduction, counted_reduce)
    return {offload: three_steps(model, offload, messages) for offload in (False, True)}


def three_steps(model: Location, offload: bool, messages: list[str]) -> list[tuple[float, list[str]]]:
    device, train = torch.device("cpu"), section(learning_rate=0.1)
    place = "host" if offload else "device"
    layout = replace(plan(1, 1, num_layers=4), keep=(LayerKeep(place, place),) * 4)
    config = engine_module.deepspeed_config(train, 2, 1, offload)
    module = build_model(model, 1, train, layout, config, device)
    engine = engine_module.initialize(module, engine_module.make_optimizer(module, train, device), config)
    ids, steps = torch.arange(16).unsqueeze(0), []
    for _ in range(3):
        messages.clear()
        context = AttentionContext(SequenceMesh(), choose_kernel("auto", device, torch.float32, 8))
        loss = engine(ids, position_ids=ids, labels=ids, loss_weight=torch.ones(1, 16), attention_context=context)
        engine.backward(loss / 16, scale_wrt_gas=False)
        engine_module.take_step(engine)
        steps.append((loss.item(), list(messages)))
    return steps


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[tuple[float, list[str]]]]:
    folder: Path = tmp_path_factory.mktemp("model")
    shape = model_config(2) | {"vocab_size": VOCAB, "num_hidden_layers": 4}
    (Location.of(folder) / "config.json").write_json(shape)
    return run_distributed(steps_of, 2, Location.of(folder))[0]


def test_a_layer_is_one_message_each_way(steps: dict[bool, list[tuple[float, list[str]]]]) -> None:
    _, messages = steps[False][2]  # the first step gathers by need, the second learns the order
    layer_gathers = [message for message in messages if message == f"gather {LAYER}"]
    assert len(layer_gathers) == 2 * 4
    assert messages.count(f"reduce {LAYER + 2 * HIDDEN}") == 4


def test_optimizer_and_activations_on_the_host_take_the_same_steps(
    steps: dict[bool, list[tuple[float, list[str]]]],
) -> None:
    losses = {offload: [loss for loss, _ in taken] for offload, taken in steps.items()}
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert losses[False][2] < losses[False][0]
