"""In-process generation: chunked prefill, greedy answers and per-token losses against plain transformers calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ultralong_ray.eval.generate import Engine

LENGTH = 192  # tokens: three times the window that the model claims


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(10, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def engine(folder: Path, chunk: int) -> Engine:
    return Engine(folder, precision="float32", prefill_chunk_tokens=chunk, device="cpu")


@torch.inference_mode()
def whole_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits  # [batch, seq, vocab]


@pytest.mark.parametrize("chunk", [1000, 64, 50, 1])
def test_chunked_prefill_equals_one_pass(tiny_llama: Path, ids: torch.Tensor, chunk: int) -> None:
    ours = engine(tiny_llama, chunk)
    logits, cache = ours.prefill(ids)
    assert cache.get_seq_length() == LENGTH, "nothing is truncated"
    torch.testing.assert_close(logits, whole_logits(ours.model, ids)[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1000, 50])
def test_token_losses_equal_one_pass(tiny_llama: Path, ids: torch.Tensor, chunk: int) -> None:
    ours = engine(tiny_llama, chunk)
    losses = ours.token_losses(ids[0].numpy().astype(np.int32))
    expected = torch.nn.functional.cross_entropy(whole_logits(ours.model, ids)[0, :-1], ids[0, 1:], reduction="none")
    assert losses.shape == (LENGTH - 1,) and losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_answers_are_transformers_greedy_answers(tiny_llama: Path, ids: torch.Tensor) -> None:
    ours = engine(tiny_llama, 50)
    ours.stop_ids = set()
    answers = ours.answer(ids.tolist(), 6)
    for row, answer in zip(ids, answers, strict=True):
        theirs = ours.model.generate(row[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, LENGTH:]
        text = ours.tokenizer.decode(theirs, skip_special_tokens=True)
        assert answer == text.lstrip().split("\n", 1)[0]
        assert ours.answer([row.tolist()], 6) == [answer], "a batch answers as each prompt alone"


class Scripted:
    """A model that says given tokens, one list per row, whatever it is asked."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.calls, self.config = rows, 0, None

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(len(self.rows), 1, 400)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[min(self.calls, len(tokens) - 1)]] = 1.0
        self.calls += 1
        return type("Output", (), {"logits": logits})


def test_answers_stop_at_eos_newline_and_limit(tiny_llama: Path) -> None:
    ours = engine(tiny_llama, 1000)
    one, two, newline = (ours.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("1", "2", "\n"))
    ours.model = Scripted([[newline, one, newline, two], [one, two, 1, two], [one, one, one, one]])
    assert ours.answer([[5], [5], [5]], 4) == ["1", "12", "1111"]
    ours.model = Scripted([[one, 1], [1]])
    assert ours.answer([[5], [5]], 8) == ["1", ""]
    assert ours.model.calls == 2, "it stops when every row has stopped"


def test_prompts_of_different_lengths_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="same number of tokens"):
        engine(tiny_llama, 1000).answer([[5], [5, 6]], 4)
