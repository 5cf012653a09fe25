"""A Hugging Face model whose one long prompt is spread over many ranks: greedy answers and per-token losses.

In go token ids, the same on every rank; out come answers and losses, the same on every rank. Every method is collective
over the default process group, whose ranks share each prompt: ulysses_degree x ring_degree of them, in the zigzag
layout of training. Weights are whole on each rank, keys and values are not (kv_cache.py). Protocol, chunks and stop
rules are those of generate.Engine. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ultralong_ray.config.degrees import heads_can_split, length_unit
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import (
    LOSS_TILE_TOKENS,
    check_losses,
    common_prefix,
    greedy_answer,
    scored_continuations,
    stop_ids,
)
from ultralong_ray.eval.kv_cache import KVSlice, Positions
from ultralong_ray.eval.partial_attention import decode_kernel
from ultralong_ray.eval.sharded_attention import SHARDED_ATTENTION, ShardedPass, register_sharded_attention
from ultralong_ray.model.angles import install_angles, rope_type_by_length
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.mlp import install_tiled_mlp
from ultralong_ray.parallel.norm import install_fused_norms
from ultralong_ray.parallel.topology import Topology, local_segments
from ultralong_ray.types import UserError

# NCCL counts a collective's time from its queueing, and the host queues a whole prompt ahead of the GPU.
GROUP_TIMEOUT = timedelta(hours=2)
MLP_TILE_TOKENS = 16384  # rows of the MLP's intermediates that exist at a time


@dataclass(frozen=True, slots=True)
class _Part:
    """One rank's rows of a chunk. Padding stands behind every row that counts, and is token 0."""

    end: int  # of the chunk
    positions: Positions  # [seq_local], ascending, those of padding included
    real: Positions  # the first ones, without padding


class ShardedModel:
    """Prefill and decode of one prompt at a time. Making it is collective. Not thread-safe."""

    def __init__(
        self,
        causal_lm: Any,
        *,
        ulysses_degree: int,
        prefill_chunk_tokens: int,
        attention: str = "auto",
        mlp_tile_tokens: int = MLP_TILE_TOKENS,
    ) -> None:
        """`causal_lm`: Llama, Qwen or Mistral with attn_implementation SHARDED_ATTENTION, on this rank's device.

        The rest of the world's size is the ring degree. Raises UserError for a degree that does not divide the world
        or cannot split the heads, for a kernel that cannot run, for an MLP of another shape, and see `check_angles`.
        """
        config = causal_lm.config
        check_angles(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        world = dist.get_world_size()
        if world % ulysses_degree or not heads_can_split(heads, kv_heads, ulysses_degree):
            raise UserError(
                f"ulysses_degree {ulysses_degree} cannot split {world} ranks, {heads} query heads and {kv_heads} "
                f"key-value heads; take a smaller one, the ring has the rest"
            )
        self._topology = Topology(world, dist.get_rank(), ulysses_degree, world // ulysses_degree)
        self._mesh = create_mesh(self._topology, GROUP_TIMEOUT)
        self.device, dtype = causal_lm.lm_head.weight.device, causal_lm.lm_head.weight.dtype
        self.kernel = choose_kernel(attention, self.device, dtype, head_dim)
        self.cache = KVSlice(config.num_hidden_layers, kv_heads, head_dim, dtype, self.device)
        self._causal_lm = causal_lm.eval()
        self._chunk_tokens = prefill_chunk_tokens
        install_angles(causal_lm)
        install_fused_norms(causal_lm)
        for layer in causal_lm.model.layers:
            install_tiled_mlp(layer.mlp, mlp_tile_tokens, lambda: False)
        self.forget()

    def forget(self) -> None:
        """Free the keys and values of the last prompt."""
        self._prompt = np.empty(0, dtype=np.int64)  # [seq], what the cache begins with
        self._length = 0  # tokens that all ranks hold together, decoded ones included
        self.cache.release()

    @torch.inference_mode()
    def prefill(self, input_ids: Sequence[int] | NDArray[Any], new_tokens: int = 0) -> torch.Tensor:
        """Run a prompt in chunks. input_ids: [seq]. Returns: logits [vocab] after its last token, on all ranks.

        Room is made for `new_tokens` more. Whole chunks shared with the prompt before are not run again.
        """
        ids = np.asarray(input_ids, dtype=np.int64)  # [seq]
        keep = min(common_prefix(self._prompt, ids), len(ids) - 1) // self._chunk_tokens * self._chunk_tokens
        self.cache.crop(keep)
        self._prompt, self._length = ids[:keep], keep
        chunks = range(keep, len(ids), self._chunk_tokens)
        last = torch.zeros(self._causal_lm.config.hidden_size, device=self.device)  # [hidden]
        for part in self._reserved_parts(chunks, len(ids), new_tokens):
            hidden = self._run_part(ids, part)  # [seq_local, hidden]
            if len(ids) - 1 in part.real:
                last.copy_(hidden[len(part.real) - 1])
        self._prompt = ids
        dist.all_reduce(last)  # one rank's row and zeros
        return self._logits(last.to(self._causal_lm.lm_head.weight.dtype))

    @torch.inference_mode()
    def decode(self, token: int) -> torch.Tensor:
        """Take one more token. Returns: logits [vocab] after it, on all ranks.

        Every rank computes it; the rank  position % degree  keeps its keys and values.
        """
        position = self._length
        mine = position % self._topology.degree == self._topology.rank
        self.cache.reserve(len(self.cache.positions) + mine)
        ids = np.full(1, token, dtype=np.int64)
        hidden = self._forward(ids, np.full(1, position, dtype=np.int64), int(mine), decode=True)
        self._length += 1
        return self._logits(hidden[0])

    def rewind(self, tokens: int) -> None:
        """Forget the keys and values of all but the first `tokens`."""
        self.cache.crop(tokens)
        self._length = tokens

    @torch.inference_mode()
    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1].

        Raises: UserError, see `generate.check_losses`.
        """
        check_losses(self._causal_lm.config)
        self.forget()
        ids = input_ids.astype(np.int64)
        losses = torch.zeros(len(ids) - 1, device=self.device)  # [seq - 1]
        run = ids[:-1]  # the last token is a target only
        chunks = range(0, len(run), self._chunk_tokens)
        for part in self._reserved_parts(chunks, len(run), 0):
            real = part.real
            rows = torch.from_numpy(real).to(self.device)
            hidden = self._run_part(run, part)  # [seq_local, hidden]
            targets = torch.from_numpy(ids[real + 1]).to(self.device)  # [rows]
            for first in range(0, len(real), LOSS_TILE_TOKENS):
                tile = slice(first, min(first + LOSS_TILE_TOKENS, len(real)))
                logits = self._causal_lm.lm_head(hidden[tile]).float()  # [tile, vocab]
                losses[rows[tile]] = torch.nn.functional.cross_entropy(logits, targets[tile], reduction="none")
        self.forget()
        dist.all_reduce(losses)
        return losses.cpu().numpy()

    def _reserved_parts(self, chunks: range, tokens: int, new_tokens: int) -> list[_Part]:
        """This rank's part of every chunk, once the cache has room for them and its share of `new_tokens`."""
        parts = [self._part(start, min(start + chunks.step, tokens)) for start in chunks]
        rows = sum(len(part.real) for part in parts)
        self.cache.reserve(len(self.cache.positions) + rows + -(-new_tokens // self._topology.degree))
        return parts

    def _part(self, start: int, end: int) -> _Part:
        unit = length_unit(self._topology.ulysses_degree, self._topology.ring_degree)
        padded = -(-(end - start) // unit) * unit
        segments = local_segments(padded, self._topology)
        positions = start + np.concatenate([np.arange(first, last, dtype=np.int64) for first, last in segments])
        return _Part(end, positions, positions[positions < end])

    def _run_part(self, ids: NDArray[np.int64], part: _Part) -> torch.Tensor:
        """Final hidden states [seq_local, hidden] of this rank's rows of a chunk; what comes before it has been run."""
        tokens = np.zeros_like(part.positions)
        tokens[: len(part.real)] = ids[part.real]
        hidden = self._forward(tokens, part.positions, len(part.real), decode=False)
        self._length = part.end
        return hidden

    def _forward(self, tokens: Positions, positions: Positions, kept: int, decode: bool) -> torch.Tensor:
        """[seq_local, hidden]; keys and values of the first `kept` rows are held afterwards."""
        kernel = decode_kernel(self.kernel) if decode else self.kernel
        sharded_pass = ShardedPass(self.cache, self._mesh, kernel, decode, self._length, kept)
        output = self._causal_lm.model(
            torch.from_numpy(tokens)[None].to(self.device),
            position_ids=torch.from_numpy(positions)[None].to(self.device),
            use_cache=False,
            sharded_pass=sharded_pass,
        )
        self.cache.commit(positions[:kept])
        return output.last_hidden_state[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[hidden] to [vocab]: rank 0's, so that no rounding ever makes ranks choose different tokens."""
        logits = self._causal_lm.lm_head(hidden[None])[0]
        dist.broadcast(logits, src=0)
        return logits


def check_angles(config: Any) -> None:
    """Raises: UserError for a RoPE whose frequencies follow from a forward's positions: each rank has only some."""
    kind = rope_type_by_length(config)
    if kind:
        raise UserError(
            f"config.json: rope_parameters.rope_type is {kind!r}, whose frequencies transformers chooses by the "
            f"largest position of a forward; in evaluate.engine kind sharded each rank and chunk has another one, so "
            f"that answers would be wrong. Evaluate it with kind in_process, or a model with rope_type yarn, linear "
            f"or llama3"
        )


class ShardedEngine:
    """One model of a folder, ready to answer on all ranks of the default process group. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        prefill_chunk_tokens: int,
        ulysses_degree: int,
        device: torch.device,
        attention: str = "auto",
    ) -> None:
        """See ShardedModel for what is raised."""
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_angles(config)  # before the weights are read
        register_sharded_attention()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        causal_lm: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, precision),
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=SHARDED_ATTENTION,
        )
        self.stop_ids = stop_ids(causal_lm, self.tokenizer)
        self.model = ShardedModel(
            causal_lm.to(device),
            ulysses_degree=ulysses_degree,
            prefill_chunk_tokens=prefill_chunk_tokens,
            attention=attention,
        )

    def prefill(self, input_ids: Sequence[int]) -> torch.Tensor:
        """Logits [vocab] after the last of token ids [seq]."""
        return self.model.prefill(input_ids)

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ("\n",), exact: bool = False
    ) -> str:
        """Greedy answer to token ids [seq]; it ends before EOS, at a stop text, or after `max_new_tokens`."""
        logits = self.model.prefill(prompt, max_new_tokens)
        return greedy_answer(logits, self.model.decode, self.tokenizer, self.stop_ids, max_new_tokens, stop, exact)

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """One after the other, the same requests on all ranks."""
        return [self.answer(each.ids, each.max_new_tokens, each.stop, each.exact) for each in requests]

    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability behind the prompt in nats, and whether it is the greedy one."""
        longest = max(map(len, continuations), default=0)
        logits = self.model.prefill(prompt, longest)
        return scored_continuations(logits, self.model.decode, lambda: self.model.rewind(len(prompt)), continuations)

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1]."""
        return self.model.token_losses(input_ids)
