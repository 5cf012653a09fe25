"""A Hugging Face model in this process: greedy answers and per-token losses of prompts of any length.

In go token ids; out come answers as text, and losses as numpy. Prompts pass through the KV cache in chunks and logits
exist for one position (answers) or one tile of positions (losses) at a time, so memory grows with the cache alone.
Nothing is ever truncated: a prompt beyond the model's window is run as it is. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ultralong_ray.eval.chunk_attention import (
    CHUNK_ATTENTION,
    Attention,
    register_chunk_attention,
    sees_all_tokens,
    usual_attention,
)
from ultralong_ray.eval.decode_together import (
    HeldPrompt,
    can_decode_together,
    decoding_together,
    grouped,
    next_logits,
)
from ultralong_ray.eval.engine import Request, cut_answer, is_finished
from ultralong_ray.model.angles import install_angles, reset_angles, rope_type_by_length
from ultralong_ray.model.extend import MODEL_CLASSES
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

LOSS_TILE_TOKENS = 1024  # rows of [vocabulary] logits that exist at a time
WHOLE_PROMPT = 2**40  # as a chunk: beyond any prompt


class Engine:
    """One model, ready to answer. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        prefill_chunk_tokens: int,
        device: str | None = None,
        attention: Attention | None = None,
        batch_tokens: int = 1,
    ) -> None:
        """`attention`: transformers' own or chunk_attention.py's, see `usual_attention`. `batch_tokens`: of prompts
        and answers that are decoded together; 1: one at a time."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.chunk_tokens = prefill_chunk_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dtype = getattr(torch, precision)
        attention = attention or usual_attention(config, self.device.type)
        self.batch_tokens = batch_tokens if can_decode_together(config) else 1
        self._angles_by_length = rope_type_by_length(config) is not None
        if self._angles_by_length:
            self.chunk_tokens = WHOLE_PROMPT
        self._can_rewind = sees_all_tokens(config) and not self._angles_by_length
        self._passed: dict[str, Any] = {}  # to every call of the model
        if attention == CHUNK_ATTENTION:
            register_chunk_attention()
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self._passed = {"kernel": choose_kernel("auto", self.device, dtype, head_dim)}
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=attention,
        )
        self.model: Any = model.to(self.device).eval()
        install_angles(self.model)
        self.stop_ids = stop_ids(self.model, self.tokenizer)
        self.forget()

    def forget(self) -> None:
        """Free the KV cache of the last prompt."""
        self._prompt = np.empty(0, dtype=np.int64)  # [seq], what the cache holds the keys and values of
        self._cache = DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def prefill(self, input_ids: Sequence[int]) -> torch.Tensor:
        """Run a prompt in chunks. input_ids: [seq]. Returns: logits [vocab] after its last token.

        Whole chunks that the prompt shares with the one before it are not run again: passkey prompts share all noise
        before the needle. Chunks start at fixed positions, so the result does not depend on what was asked before.
        A model that cannot be taken back to an earlier token runs all of them, and one whose angles follow from the
        length of a forward runs a prompt in one, as `model.generate` does.
        """
        ids = np.asarray(input_ids, dtype=np.int64)  # [seq]
        # The last chunk always runs, for its logits.
        shared = min(common_prefix(self._prompt, ids), len(ids) - 1) if self._can_rewind else 0
        keep = shared // self.chunk_tokens * self.chunk_tokens
        if keep:
            # Negative: how many tokens to drop. transformers 5.23 refuses the positive form that 5.17 also takes.
            self._cache.crop(keep - self._cache.get_seq_length())
        else:
            self._cache = DynamicCache(config=self.model.config)
        self._prompt = ids
        self._forget_angles()
        output: Any = None
        for chunk in torch.from_numpy(ids[None, keep:]).to(self.device).split(self.chunk_tokens, dim=1):  # [1, chunk]
            output = self._run(self.model, chunk, self._cache, logits_to_keep=1)
        return output.logits[0, -1]

    def _forget_angles(self) -> None:
        """Where they follow from lengths: those of the prompt before, so that none decides over the next one."""
        if self._angles_by_length:
            reset_angles(self.model)

    @torch.inference_mode()
    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ("\n",), exact: bool = False
    ) -> str:
        """Greedy answer to token ids [seq]; it ends before EOS, at a stop text, or after `max_new_tokens`."""
        logits = self.prefill(prompt)
        return greedy_answer(logits, self._decode, self.tokenizer, self.stop_ids, max_new_tokens, stop, exact)

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """Prompts are read one after the other, so that neighbours which begin alike share that work."""
        found: list[str] = []
        for group in grouped(requests, lambda: self.batch_tokens):
            together = self._answers_together(group) if len(group) > 1 else None
            found += together or [self.answer(each.ids, each.max_new_tokens, each.stop, each.exact) for each in group]
        return found

    def _answers_together(self, group: list[Request]) -> list[str] | None:
        """None where the memory does not hold all of them; later groups are half as large then."""
        try:
            return self._decoded_together(group)
        except torch.OutOfMemoryError:
            tokens = sum(each.tokens for each in group)
            self.batch_tokens = max(1, tokens // 2)
            logger.warning(
                "%d prompts of %s tokens in all do not fit into memory of %s together; evaluate.engine.batch_tokens "
                "is %s from here on: lower it in the recipe",
                *(len(group), f"{tokens:,}", self.device, f"{self.batch_tokens:,}"),
            )
        self.forget()  # what was being written
        return None

    @torch.inference_mode()
    def _decoded_together(self, group: list[Request]) -> list[str]:
        answers = [GreedyAnswer(self.tokenizer, self.stop_ids, r.max_new_tokens, r.stop, r.exact) for r in group]
        going: list[tuple[GreedyAnswer, HeldPrompt]] = []
        for request, answer in zip(group, answers, strict=True):
            if answer.take(int(self.prefill(request.ids).argmax())):
                going.append((answer, HeldPrompt(self._cache, request.max_new_tokens)))
        with decoding_together(self.model):
            while going:
                last = [answer.ids[-1] for answer, _ in going]
                logits = next_logits(self.model, [held for _, held in going], last, self.device)
                chosen = logits.argmax(-1).tolist()
                going = [each for each, token in zip(going, chosen, strict=True) if each[0].take(token)]
        return [answer.text() for answer in answers]

    @torch.inference_mode()
    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability behind the prompt in nats, and whether it is the greedy one."""

        def rewind() -> None:
            if not self._can_rewind:
                self.prefill(prompt)
                return
            self._cache.crop(len(prompt) - self._cache.get_seq_length())

        return scored_continuations(self.prefill(prompt), self._decode, rewind, continuations)

    def _decode(self, token: int) -> torch.Tensor:
        """Logits [vocab] after one more token."""
        next_id = torch.tensor([[token]], device=self.device)  # [1, 1]
        return self._run(self.model, next_id, self._cache).logits[0, -1]

    def _run(self, model: Any, ids: torch.Tensor, cache: DynamicCache, **more: Any) -> Any:
        """Token ids [1, rows] through `model`, behind what `cache` holds."""
        return model(ids, past_key_values=cache, use_cache=True, **self._passed, **more)

    @torch.inference_mode()
    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1].

        Raises: UserError, see `check_losses`.
        """
        check_losses(self.model.config)
        self.forget()
        self._forget_angles()
        ids = torch.from_numpy(input_ids.astype(np.int64))[None].to(self.device)  # [1, seq]
        cache = DynamicCache(config=self.model.config)
        losses: list[torch.Tensor] = []
        # The last token is a target only; it is not run.
        for start in range(0, ids.shape[1] - 1, self.chunk_tokens):
            end = min(start + self.chunk_tokens, ids.shape[1] - 1)
            output = self._run(self.model.model, ids[:, start:end], cache)
            hidden = output.last_hidden_state[0]  # [chunk, hidden]
            targets = ids[0, start + 1 : end + 1]  # [chunk]
            for rows, wanted in zip(hidden.split(LOSS_TILE_TOKENS), targets.split(LOSS_TILE_TOKENS), strict=True):
                logits = self.model.lm_head(rows).float()  # [tile, vocab]
                losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
        return torch.cat(losses).numpy()


def check_losses(config: Any) -> None:
    """Raises: UserError for a family whose logits may be more than `lm_head` of the hidden states: some scale them."""
    if config.model_type not in MODEL_CLASSES:
        raise UserError(
            f"config.json: model_type is {config.model_type!r}, and losses are exact only for "
            f"{', '.join(MODEL_CLASSES)}; take tasks of kind perplexity out of evaluate.tasks and hold no documents "
            f"out (prepare.holdout_sequences, holdout_ids), or evaluate a model of one of these families"
        )


class GreedyAnswer:
    """An answer as it grows. It ends before a token of `stop_ids`, at a text of `stop`, or after `max_new_tokens`."""

    def __init__(
        self, tokenizer: Any, stop_ids: Collection[int], max_new_tokens: int, stop: Sequence[str], exact: bool
    ) -> None:
        """`stop` and `exact`: see `engine.cut_answer`."""
        self.ids: list[int] = []
        self._tokenizer, self._stop_ids, self._most = tokenizer, stop_ids, max_new_tokens
        self._stop, self._exact = stop, exact

    def take(self, token: int) -> bool:
        """The likeliest next token; returns whether another one is wanted."""
        if token in self._stop_ids:
            return False
        self.ids.append(token)
        if len(self.ids) >= self._most:
            return False
        return not (self._stop and is_finished(self._decoded(), self._stop, self._exact))

    def text(self) -> str:
        return cut_answer(self._decoded(), self._stop, self._exact)

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.ids, skip_special_tokens=True)


def greedy_answer(
    logits: torch.Tensor,
    decode: Callable[[int], torch.Tensor],
    tokenizer: Any,
    stop_ids: Collection[int],
    max_new_tokens: int,
    stop: Sequence[str] = ("\n",),
    exact: bool = False,
) -> str:
    """The text that follows a prompt with `logits` [vocab]; `decode` takes a token and gives the logits after it.

    Where it ends: `GreedyAnswer`.
    """
    answer = GreedyAnswer(tokenizer, stop_ids, max_new_tokens, stop, exact)
    while answer.take(int(logits.argmax())):
        logits = decode(answer.ids[-1])
    return answer.text()


def scored_continuations(
    logits: torch.Tensor,
    decode: Callable[[int], torch.Tensor],
    rewind: Callable[[], None],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation of a prompt with `logits` [vocab], and whether it is the greedy one.

    `decode` takes a token and gives the logits after it; `rewind` forgets all tokens that it took. It may read the
    whole prompt anew, and so is called only where more is decoded afterwards.
    """
    scores = []
    behind = False  # tokens of an earlier continuation stand behind the prompt
    for ids in continuations:
        if behind and len(ids) > 1:
            rewind()
            behind = False
        total, greedy, row = 0.0, True, logits
        for place, token in enumerate(ids):
            row = (decode(ids[place - 1]) if place else row).float().log_softmax(-1)  # [vocab]
            total += float(row[token])
            greedy = greedy and int(row.argmax()) == token
        behind = behind or len(ids) > 1
        scores.append((total, greedy))
    return scores


def common_prefix(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Number of leading ids that both have in common."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every end-of-text id that the tokenizer or the generation config names; Llama 3.1 names several."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {token for token in ids if token is not None}
