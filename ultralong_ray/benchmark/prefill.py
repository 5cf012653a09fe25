"""The sharded inference engine on the clock: one rank's part. Read against transformers 5.17 and 5.23.

Flows in: a Prefill. Flows out: seconds of the prefill and of every decoded token, the tokens, memory as the device
counts it. Weights are random, drawn alike on every rank; there is no tokenizer and no file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong_ray.benchmark.measure import peak_memory, reset_peak, synchronize
from ultralong_ray.benchmark.setups import SHAPES, refuse_heads
from ultralong_ray.eval.sharded import ShardedModel
from ultralong_ray.eval.sharded_attention import SHARDED_ATTENTION, register_sharded_attention
from ultralong_ray.types import UserError

WARMUP_TOKENS = 65536  # what is compiled on first use, and the groups of ranks, are not on the clock
WARMUP_DECODE = 2


@dataclass(frozen=True, slots=True)
class Prefill:
    """A whole command."""

    shape: str
    layers: int
    length: int  # tokens of the prompt
    decode: int  # tokens after it
    num_gpus: int
    device: Literal["cuda", "cpu"]
    ulysses: int
    ring: int
    chunk: int  # tokens of the prompt at a time
    attention: str
    mlp_tile: int
    seed: int
    limit_seconds: float
    began: float  # time.time() of the command

    @property
    def precision(self) -> Literal["bfloat16", "float32"]:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def config(self) -> dict[str, Any]:
        """The shape's config.json at the depth asked for."""
        return {**SHAPES[self.shape], "num_hidden_layers": self.layers}

    def check(self) -> None:
        """Raise UserError for what cannot run, before any process is started."""
        if self.ulysses * self.ring != self.num_gpus:
            raise UserError(
                f"degrees {self.ulysses}x{self.ring} are not --gpus {self.num_gpus}: all share the one prompt"
            )
        refuse_heads(self.shape, self.ulysses)


def run(prefill: Prefill, device: torch.device) -> dict[str, Any]:
    """Every rank's part of the command."""
    started = time.perf_counter()
    model = build(prefill, device)
    build_seconds = time.perf_counter() - started
    progress(prefill, f"model of {prefill.layers} layers built, attention kernel {model.kernel.name}")
    vocab = prefill.config["vocab_size"]
    ids = np.random.default_rng(prefill.seed).integers(0, vocab, prefill.length)  # [length]
    one_chunk = prefill.chunk >= prefill.length
    warm = ids[: WARMUP_TOKENS if one_chunk else prefill.chunk + WARMUP_TOKENS]
    decode(model, int(model.prefill(warm, WARMUP_DECODE).argmax()), WARMUP_DECODE, device)
    model.forget()
    progress(prefill, f"warmed up with {len(warm):,} tokens")
    reset_peak(device)
    before = allocated(device)
    synchronize(device)
    started = time.perf_counter()
    logits = model.prefill(ids, prefill.decode)
    synchronize(device)
    prefill_seconds = time.perf_counter() - started
    finite, first = bool(logits.isfinite().all()), int(logits.argmax())
    del logits
    progress(prefill, f"prefill of {prefill.length:,} tokens: {prefill_seconds:.3f} s")
    cached = allocated(device) - before
    tokens, seconds = decode(model, first, prefill.decode, device)
    progress(prefill, f"decode of {prefill.decode} tokens: {sum(seconds):.3f} s")
    return {
        "kernel": model.kernel.name,
        "build_seconds": build_seconds,
        "prefill_seconds": prefill_seconds,
        "decode_seconds": seconds,
        "tokens": tokens,
        "finite": finite,
        "kv_bytes": model.cache.num_bytes,
        "kv_bytes_on_device": cached,
        "kv_rows": len(model.cache.positions),
        **peak_memory(device),
    }


def build(prefill: Prefill, device: torch.device) -> ShardedModel:
    """The model with random weights, made on the device."""
    register_sharded_attention()
    torch.manual_seed(prefill.seed)
    with device:
        causal_lm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**prefill.config),
            attn_implementation=SHARDED_ATTENTION,
            dtype=getattr(torch, prefill.precision),
        )
    return ShardedModel(
        causal_lm,
        ulysses_degree=prefill.ulysses,
        prefill_chunk_tokens=prefill.chunk,
        attention=prefill.attention,
        mlp_tile_tokens=prefill.mlp_tile,
    )


def decode(model: ShardedModel, token: int, count: int, device: torch.device) -> tuple[list[int], list[float]]:
    """(the `count` tokens that the model was given, seconds of each): greedy, beginning with `token`."""
    tokens, seconds = [], []
    for _ in range(count):
        synchronize(device)
        started = time.perf_counter()
        tokens.append(token)
        token = int(model.decode(token).argmax())
        seconds.append(time.perf_counter() - started)
    return tokens, seconds


def allocated(device: torch.device) -> int:
    """Bytes of living tensors on this rank's GPU, 0 on CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def progress(prefill: Prefill, text: str) -> None:
    """A line from rank 0, with the seconds since the command began."""
    if dist.get_rank() == 0:
        print(f"[{time.time() - prefill.began:7.1f} s] {text}", flush=True)
