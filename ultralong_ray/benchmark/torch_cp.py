"""Hugging Face's context-parallel path as a contestant: torch's context_parallel over SDPA, FSDP2, full recomputation.

What accelerate 1.15 and TRL 1.16 set up for cp_backend "torch": all-gather of keys and values, head-tail balance, cuDNN
SDPA where torch picks it, chunked loss. Read against torch 2.13 (torch/distributed/tensor/experimental), an API that
calls itself a prototype; transformers 5.17 and 5.23. It has no CPU path: aten's CPU flash attention cannot be sharded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from ultralong_ray.benchmark.launch import Unavailable
from ultralong_ray.benchmark.measure import StepNumbers, Work, measure, progress
from ultralong_ray.benchmark.setups import LEARNING_RATE
from ultralong_ray.benchmark.tokens import sequence
from ultralong_ray.train.weights import fill_drawn

ROTATE_METHOD = "allgather"
LOSS_CHUNK_TOKENS = 2048
IGNORED_LABEL = -100


def run(work: Work, device: torch.device) -> dict[str, Any]:
    """Every rank's part of the contestant. Raises Unavailable where it cannot run."""
    if device.type != "cuda":
        raise Unavailable("torch's context_parallel has no CPU attention")
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no context_parallel as known here: {error}") from error
    if work.setup.length % (2 * dist.get_world_size()):
        raise Unavailable(f"{work.setup.length} tokens cannot be balanced over {dist.get_world_size()} ranks")
    started = time.perf_counter()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))
    set_rotate_method(ROTATE_METHOD)
    model = _Model(work, device)
    # float32 masters and optimizer state, bfloat16 computation, as in every contestant
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    progress(work, f"model of {work.setup.layers} layers built")

    @contextlib.contextmanager
    def sharded(buffers: list[torch.Tensor]) -> Iterator[None]:
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers={*buffers}):
            yield

    def batch(index: int) -> list[torch.Tensor]:
        vocab = work.benchmark.config(1)["vocab_size"]
        ids = torch.from_numpy(sequence(work.setup.length, vocab, work.benchmark.seed, index)).to(device)[None]
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), IGNORED_LABEL)], dim=1)
        return [ids, torch.arange(work.setup.length, device=device)[None], labels]  # each [1, length]

    def step(buffers: list[torch.Tensor]) -> StepNumbers:
        optimizer.zero_grad(set_to_none=True)
        with sharded(buffers):  # the buffers are this rank's part now, [1, seq_local]
            # FSDP averages gradients over the ranks, hence the factor
            loss = model(*buffers) * (dist.get_world_size() / (work.setup.length - 1))
            loss.backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return StepNumbers(mean.item() / dist.get_world_size(), whole.item())

    answer = {
        "kernel": f"sdpa under context_parallel ({ROTATE_METHOD})",
        "build_seconds": time.perf_counter() - started,
    }
    return answer | measure(work, device, batch, step)


class _Model(nn.Module):
    """A Hugging Face model, checkpointed, whose loss is computed in chunks that are recomputed in backward."""

    def __init__(self, work: Work, device: torch.device) -> None:
        super().__init__()
        shape = AutoConfig.for_model(**work.benchmark.config(work.setup.layers))
        AttentionMaskInterface.register("sdpa", lambda *args, **kwargs: None)  # causality comes from is_causal
        with torch.device("meta"):
            causal_lm: Any = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", dtype=torch.float32)
        causal_lm.to_empty(device=device)
        causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config=shape).to(device)
        generator = torch.Generator(device).manual_seed(work.benchmark.seed)
        for name, parameter in causal_lm.named_parameters():
            fill_drawn(parameter, name, shape.initializer_range, generator)
        enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self.causal_lm = causal_lm.train()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy over this rank's tokens; all three [1, seq_local]."""
        hidden = self.causal_lm.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, targets in zip(hidden[0].split(LOSS_CHUNK_TOKENS), labels[0].split(LOSS_CHUNK_TOKENS), strict=True):
            total = total + checkpoint(self._chunk_loss, rows, targets, use_reentrant=False)
        return total

    def _chunk_loss(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.causal_lm.lm_head(rows).float()  # [chunk, vocab]
        return cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
