"""The problem that every parallel case must solve alike, and its answer from one process, plain torch and plain
Hugging Face: what `test_numerics.py` compares with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.parallel.spawn import VOCAB, plan, section
from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.storage import Location
from ultralong_ray.train import engine as engine_module
from ultralong_ray.train import replay as replay_module
from ultralong_ray.train import step as step_module
from ultralong_ray.train.batches import accumulation_steps, read_step
from ultralong_ray.train.step import MicroBatch
from ultralong_ray.train.weights import build_model
from ultralong_ray.types import LayerKeep

LENGTH = 48
STARTS = [[0, 7, 20, 21, 40], [0, 30]]


@dataclass(frozen=True)
class Case:
    """One way to compute the step. `changes` are fields of the training section."""

    name: str
    ulysses: int
    ring: int = 1
    kv_heads: int = 2
    heads: int = 4
    tied: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    keep: LayerKeep = field(default_factory=LayerKeep)
    broken: str | None = None  # a key of BREAKAGES: the comparison must notice it


@dataclass(frozen=True)
class Answer:
    loss: float
    grad_norm: float
    gradients: dict[str, np.ndarray]


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [2, LENGTH]: weights 0, 1 and 3, the last third of sequence 1 padding, so that the last rank of
    degree 4 has no target in it, and every rank another sum."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, (2, LENGTH))
    weights = rng.choice([0, 1, 3], (2, LENGTH))
    weights[1, 32:] = 0
    return ids, weights


def reference(model: Location, mask_documents: bool) -> Answer:
    """Loss, gradients and their norm of sum(w * ce) / sum(w), by eager attention over an explicit mask."""
    ids, weights = problem()
    causal_lm = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    weight_sum = 0.0
    for row in range(2):
        documents = np.searchsorted(STARTS[row], np.arange(LENGTH), side="right")
        same = documents[:, None] == documents[None, :]
        allowed = np.tril(same if mask_documents else np.ones_like(same))
        mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~torch.from_numpy(allowed), float("-inf"))
        logits = causal_lm(torch.from_numpy(ids[row : row + 1]), attention_mask=mask).logits[0]
        target_weight = torch.from_numpy(weights[row, 1:]).float()
        if mask_documents:
            target_weight = target_weight * torch.from_numpy(documents[1:] == documents[:-1])
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[row, 1:]), reduction="none")
        total = total + (losses * target_weight).sum()
        weight_sum += float(target_weight.sum())
    loss = total / weight_sum
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in causal_lm.named_parameters() if p.grad is not None}
    norm = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values())))
    return Answer(loss.item(), norm, gradients)


Models = dict[tuple[int, int, bool], Location]  # by query heads, key-value heads, tied


def solve(models: Models, packed: Location, cases: list[Case]) -> list[list[Answer]]:
    """Each case on the running process group: [by ZeRO-3's gradients where there are any, by an SGD step]."""
    device = torch.device("cpu")
    engine_module.init_distributed(device)
    return [_solve(models[case.heads, case.kv_heads, case.tied], packed, case, device) for case in cases]


def _solve(model: Location, packed: Location, case: Case, device: torch.device) -> list[Answer]:
    train = section(**case.changes)
    topology = Topology(dist.get_world_size(), dist.get_rank(), case.ulysses, case.ring)
    layout = plan(case.ulysses, case.ring, num_layers=2, keep=(case.keep,) * 2)
    replay_module.PREFIX_ROWS = 2  # as short as the sequences are
    accumulation = accumulation_steps(train, topology)
    config = engine_module.deepspeed_config(train, topology.world_size, accumulation, layout.offload_optimizer)
    module = build_model(model, None, train, layout, config, device)
    # SGD of rate 1 moves a parameter by its gradient: the one observation that means the same at every ZeRO stage
    engine = engine_module.initialize(module, torch.optim.SGD(module.parameters(), lr=1.0), config)
    before = _whole_parameters(module)
    answers: list[dict[str, np.ndarray]] = []

    def observe(running: Any) -> torch.Tensor:
        if train.zero_stage == 3:
            answers.append(_zero3_gradients(module))
        return engine_module.take_step(running)

    step_module.take_step = observe
    batches = read_step(1, PackedReader(packed), train, topology, device)
    step_module.dist = dist if case.broken != "mean per rank" else _LocalWeights()
    if case.broken in BREAKAGES:
        batches = [BREAKAGES[case.broken](batch) for batch in batches]
    kernel = choose_kernel("math", device, torch.float32, 8)
    result = step_module.train_step(engine, batches, create_mesh(topology), kernel, 0.0)
    after = _whole_parameters(module)
    answers.append({name: before[name] - after[name] for name in before})
    sums = result.rank_sums.sum(0)
    return [Answer(float(sums[0] / sums[1]), float(result.grad_norm), gradients) for gradients in answers]


BREAKAGES: dict[str, Callable[[MicroBatch], MicroBatch]] = {
    "labels not shifted": lambda batch: replace(batch, labels=batch.input_ids),
    "every target weighs 1": lambda batch: replace(
        batch, loss_weight=(batch.labels >= 0).float(), weight=float((batch.labels >= 0).sum())
    ),
    "positions as if the rank held one run": lambda batch: replace(
        batch, position_ids=batch.position_ids[:, :1] + torch.arange(batch.position_ids.shape[1])
    ),
    "weight of the input token": lambda batch: replace(batch, loss_weight=batch.loss_weight.roll(1, 1)),
}


class _LocalWeights:
    """torch.distributed, but the sum of weights over ranks is this rank's times their number."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dim() == 0:
            tensor.mul_(dist.get_world_size())
        else:
            dist.all_reduce(tensor)


def _whole_parameters(module: torch.nn.Module) -> dict[str, np.ndarray]:
    whole = {}
    for name, parameter in module.named_parameters():
        with engine_module.writable(parameter):
            whole[name.removeprefix("causal_lm.")] = parameter.detach().numpy().copy()
    return whole


def _zero3_gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    from deepspeed.utils import safe_get_full_grad

    return {n.removeprefix("causal_lm."): _present(safe_get_full_grad(p)).numpy() for n, p in module.named_parameters()}


def _present(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient
