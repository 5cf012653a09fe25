"""A Hugging Face model in this process: greedy answers and per-token losses of prompts of any length.

In go token ids; out come answers as text, and losses as numpy. Prompts pass through the KV cache in chunks and logits
exist for one position (answers) or one tile of positions (losses) at a time, so memory grows with the cache alone.
Nothing is ever truncated: a prompt beyond the model's window is run as it is. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

LOSS_TILE_TOKENS = 1024  # rows of [vocabulary] logits that exist at a time


class Engine:
    """One model, ready to answer. Not thread-safe."""

    def __init__(self, folder: Path, *, precision: str, prefill_chunk_tokens: int, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.chunk_tokens = prefill_chunk_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, precision), trust_remote_code=False, use_safetensors=True
        )
        self.model: Any = model.to(self.device).eval()
        self.stop_ids = _stop_ids(self.model, self.tokenizer)

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
        """Run prompts of equal length. input_ids: [batch, seq]. Returns: logits [batch, vocab] after the last token."""
        cache = DynamicCache(config=self.model.config)
        output: Any = None
        for chunk in input_ids.split(self.chunk_tokens, dim=1):  # [batch, chunk]
            output = self.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], cache

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """Greedy answers to prompts of equal token count; each ends before EOS, a newline after text, or the limit.

        Raises: ValueError for prompts of different lengths.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ValueError("prompts of one batch must have the same number of tokens")
        input_ids = torch.tensor(prompts, device=self.device)  # [batch, seq]
        logits, cache = self.prefill(input_ids)
        answers: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for step in range(max_new_tokens):
            next_ids = logits.argmax(dim=-1)  # [batch]
            for row, token in enumerate(next_ids.tolist()):
                done[row] = done[row] or token in self.stop_ids
                if not done[row]:
                    answers[row].append(token)
                    done[row] = "\n" in self._text(answers[row]).lstrip()
            if all(done) or step == max_new_tokens - 1:
                break
            output = self.model(next_ids[:, None], past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]
        return [self._text(ids).lstrip().split("\n", 1)[0] for ids in answers]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.inference_mode()
    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1]."""
        ids = torch.from_numpy(input_ids.astype(np.int64))[None].to(self.device)  # [1, seq]
        cache = DynamicCache(config=self.model.config)
        losses: list[torch.Tensor] = []
        # The last token is a target only; it is not run.
        for start in range(0, ids.shape[1] - 1, self.chunk_tokens):
            end = min(start + self.chunk_tokens, ids.shape[1] - 1)
            output = self.model.model(ids[:, start:end], past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[0]  # [chunk, hidden]
            targets = ids[0, start + 1 : end + 1]  # [chunk]
            for rows, wanted in zip(hidden.split(LOSS_TILE_TOKENS), targets.split(LOSS_TILE_TOKENS), strict=True):
                logits = self.model.lm_head(rows).float()  # [tile, vocab]
                losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
        return torch.cat(losses).numpy()


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every end-of-text id that the tokenizer or the generation config names; Llama 3.1 names several."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {token for token in ids if token is not None}
