"""DeepSpeed ALST with its own recipe as a contestant, and ring-flash-attn's zigzag attention in the same surroundings.

ALST (arXiv 2506.13996): Ulysses under Hugging Face attention, reentrant checkpointing with full recomputation, an MLP
tiled by shards of hidden_size rows, a loss tiled to 1 GiB of logits, ZeRO-3, Adam on the GPU, no offload. Its published
kernel is flash-attn 2; where that is not installed, torch's flash backend runs, which is the same code inside torch.

Read against deepspeed 0.19.8 (runtime/sequence_parallel/ulysses_sp.py), arctic-training 0.8.0, transformers 5.17 and
5.23, ring-flash-attn 0.1.8. DeepSpeed patches transformers process-wide and allows one degree per process.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, UlyssesSPAttentionHF
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from ultralong_ray.benchmark.launch import Unavailable
from ultralong_ray.benchmark.measure import StepNumbers, Work, measure, progress
from ultralong_ray.benchmark.setups import LEARNING_RATE
from ultralong_ray.benchmark.tokens import Segments, sequence, slice_of
from ultralong_ray.config import PretrainConfig
from ultralong_ray.parallel.topology import Topology, local_segments
from ultralong_ray.train.engine import init_distributed, make_optimizer
from ultralong_ray.train.weights import draw_weights

LOSS_TILE_GIB = 1.0  # of float32 logits: ArcticTraining's slice size
RING_NAME = "ring_flash_attn"


def run(work: Work, device: torch.device) -> dict[str, Any]:
    """Every rank's part of the contestant `alst` or `ring_flash_attn`. Raises Unavailable where it cannot run."""
    started = time.perf_counter()
    ring = work.contestant == RING_NAME
    kernel = _register_ring(device) if ring else _core_attention(work.benchmark.peer_attention, device)
    init_distributed(device)
    model = _Model(work, device, RING_NAME if ring else _implementation(kernel))
    world, setup = dist.get_world_size(), work.setup
    mpu = None
    if not ring:
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model.causal_lm,
            core_attn_implementation=_implementation(kernel),
            sequence_parallel_size=world,
            micro_batch_size=1,
            seq_length=setup.length,
            seq_length_is_variable=False,
        )
    optimizer = make_optimizer(model, _section(work), device)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=_config(work), mpu=mpu, dist_init_required=False
    )
    topology = Topology(world, dist.get_rank(), 1, world) if ring else Topology(world, dist.get_rank(), world, 1)
    segments = local_segments(setup.length, topology)
    build_seconds = time.perf_counter() - started
    progress(work, f"model of {setup.layers} layers built, attention {kernel}")
    peer = _Peer(work, device, engine, segments)
    return {"kernel": kernel, "build_seconds": build_seconds, **measure(work, device, peer.batch, peer.step)}


class _Peer:
    """Batches and steps of an engine around `_Model`."""

    def __init__(self, work: Work, device: torch.device, engine: Any, segments: Segments) -> None:
        self.work, self.device, self.engine, self.segments = work, device, engine, segments
        self.vocab = work.benchmark.config(1)["vocab_size"]

    def batch(self, index: int) -> dict[str, Any]:
        ids = sequence(self.work.setup.length, self.vocab, self.work.benchmark.seed, index)
        part = slice_of(ids, self.segments)
        arrays = {"input_ids": part.input_ids, "position_ids": part.position_ids, "labels": part.labels}
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def step(self, batch: dict[str, Any]) -> StepNumbers:
        targets = self.work.setup.length - 1
        # DeepSpeed averages gradients over all ranks; the wanted gradient is that of the mean over all targets.
        loss = self.engine(**batch, scale=dist.get_world_size() / targets)
        self.engine.backward(loss)
        self.engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        return StepNumbers(mean.item() / dist.get_world_size(), float(self.engine.get_global_grad_norm()))


class _Model(nn.Module):
    """A Hugging Face model with ALST's tiled MLP, tiled loss and checkpointing; the seed's weights."""

    def __init__(self, work: Work, device: torch.device, implementation: str) -> None:
        super().__init__()
        shape = AutoConfig.for_model(**work.benchmark.config(work.setup.layers))
        dtype = torch.bfloat16 if work.benchmark.precision == "bfloat16" else torch.float32
        # Without it transformers may build a mask of [seq_local, seq_local], which DeepSpeed then throws away.
        AttentionMaskInterface.register(implementation, lambda *args, **kwargs: None)
        remote = None if device.type == "cuda" else "cpu"
        with deepspeed.zero.Init(config_dict_or_path=_config(work), remote_device=remote):
            causal_lm: Any = AutoModelForCausalLM.from_config(shape, attn_implementation=implementation, dtype=dtype)
        # zero.Init has rounded RoPE's frequencies to bfloat16; see train/weights.py.
        causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config=shape).to(device)
        draw_weights(causal_lm, shape.initializer_range, work.benchmark.seed, device)
        type(causal_lm.model.layers[0].mlp).forward = _tiled_mlp
        enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        self.causal_lm = causal_lm.train()
        self.vocab = shape.vocab_size

    def forward(
        self,
        input_ids: torch.Tensor,  # [1, seq_local]
        position_ids: torch.Tensor,  # [1, seq_local]
        labels: torch.Tensor,  # [1, seq_local], shifted
        scale: float,
    ) -> torch.Tensor:
        """scale * sum of cross-entropy over this rank's tokens: a scalar."""
        hidden = self.causal_lm.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).last_hidden_state  # [1, seq_local, hidden_size]
        head = self.causal_lm.lm_head

        def loss_of(module: nn.Module, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            # TiledFusedLogitsLoss runs the head's backward here and now, so the scale must be inside.
            return scale * cross_entropy(module(rows).float(), targets, ignore_index=-100, reduction="sum")

        shards = math.ceil(labels.numel() * self.vocab * 4 / 2**30 / LOSS_TILE_GIB)
        return TiledFusedLogitsLoss.apply(loss_of, head, hidden, labels, None, shards, [head.weight], "sum")


def _tiled_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """ALST's MLP: shards of hidden_size rows, their number agreed upon by all ranks in every layer."""
    shards = torch.tensor(math.ceil(x.shape[1] / x.shape[2]), device=x.device)
    dist.all_reduce(shards, op=dist.ReduceOp.MAX)

    def forward(module: Any, rows: torch.Tensor) -> torch.Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(rows)) * module.up_proj(rows))

    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    return TiledMLP.apply(forward, self, x, int(shards.item()), weights)


def _config(work: Work) -> dict[str, Any]:
    """ZeRO-3 as ALST's recipes have it."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": work.benchmark.precision == "bfloat16"},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if work.contestant != RING_NAME:
        config["sequence_parallel_size"] = work.benchmark.num_ranks
    return config


def _section(work: Work) -> PretrainConfig:
    """The same AdamW as ours."""
    return PretrainConfig(
        global_batch_sequences=1, learning_rate=LEARNING_RATE, precision=work.benchmark.precision, zero_stage=3
    )


def _core_attention(requested: str, device: torch.device) -> str:
    """What attends under Ulysses, for the record. On a GPU torch's SDPA is held to its flash backend."""
    installed = importlib.util.find_spec("flash_attn") is not None and hasattr(
        importlib.import_module("flash_attn"), "flash_attn_varlen_func"
    )
    if requested == "flash_attention_2" or (requested == "auto" and device.type == "cuda" and installed):
        if not installed:
            raise Unavailable("flash_attention_2 was asked for and flash-attn 2 is not installed")
        return "flash_attention_2 (flash-attn package)"
    if requested not in ("auto", "sdpa"):
        return f"{requested} (as named by --peer-attention)"
    if device.type != "cuda":
        return "sdpa (torch, CPU)"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    return "sdpa (torch's flash backend, which is flash-attn 2; the flash-attn package is not used)"


def _implementation(kernel: str) -> str:
    """transformers' name of it."""
    return kernel.split(" ", 1)[0]


def _register_ring(device: torch.device) -> str:
    """Make ring-flash-attn's zigzag attention known to transformers. Raises Unavailable without it."""
    if device.type != "cuda":
        raise Unavailable("ring_flash_attn needs a GPU")
    try:
        module = importlib.import_module("ring_flash_attn")
    except ImportError as error:
        raise Unavailable(f"ring_flash_attn cannot be imported: {error}") from error

    def attention(
        layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        heads_last = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # [batch, seq_local, heads, head_dim]
        return module.zigzag_ring_flash_attn_func(*heads_last, softmax_scale=kwargs.get("scaling"), causal=True), None

    AttentionInterface.register(RING_NAME, attention)
    return "ring_flash_attn zigzag (flash-attn 2)"
