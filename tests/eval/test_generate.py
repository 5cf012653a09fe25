"""In-process generation: chunked prefill, greedy answers and per-token losses against plain transformers calls."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from ultralong_ray.eval import chunk_attention
from ultralong_ray.eval.chunk_attention import usual_attention
from ultralong_ray.eval.generate import Engine
from ultralong_ray.types import UserError

LENGTH = 192  # tokens: three times the window that the model claims


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(10, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def engine(folder: Path, chunk: int, attention: Any = None) -> Engine:
    return Engine(folder, precision="float32", prefill_chunk_tokens=chunk, device="cpu", attention=attention)


@torch.inference_mode()
def whole_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits  # [batch, seq, vocab]


@pytest.mark.parametrize("attention", ["sdpa", "ultralong_chunk"])
@pytest.mark.parametrize("chunk", [1000, 64, 50, 1])
def test_chunked_prefill_equals_one_pass(tiny_llama: Path, ids: torch.Tensor, chunk: int, attention: str) -> None:
    logits = engine(tiny_llama, chunk, attention).prefill(ids[0].tolist())
    expected = whole_logits(engine(tiny_llama, chunk).model, ids)[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_both_attentions_give_the_same_answers_and_losses(tiny_llama: Path, ids: torch.Tensor) -> None:
    ours, theirs = engine(tiny_llama, 50, "ultralong_chunk"), engine(tiny_llama, 50, "sdpa")
    assert ours.model.config._attn_implementation != theirs.model.config._attn_implementation
    for prompt in ids.tolist():
        assert ours.answer(prompt, 20, stop=()) == theirs.answer(prompt, 20, stop=())
        losses = (each.token_losses(np.array(prompt, dtype=np.int32)) for each in (ours, theirs))
        np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-4)


def test_decoding_leaves_torch_its_flash_backend_alone(
    tiny_llama: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN would build a graph for every number of keys."""
    rows: list[int] = []

    def watched(module: Any, query: torch.Tensor, *rest: Any, **named: Any) -> Any:
        rows.append(query.shape[2])
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
        return forward(module, query, *rest, **named)

    forward = chunk_attention.sdpa_attention_forward
    monkeypatch.setattr(chunk_attention, "sdpa_attention_forward", watched)
    engine(tiny_llama, 50, "ultralong_chunk").answer(ids[0].tolist(), 3, stop=())
    assert rows and set(rows) == {1}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_gpus_get_our_attention_unless_a_window_slides() -> None:
    llama, mistral = LlamaConfig(), MistralConfig(sliding_window=4096)
    assert usual_attention(llama, "cuda") == usual_attention(MistralConfig(sliding_window=None), "cuda") != "sdpa"
    assert usual_attention(mistral, "cuda") == usual_attention(llama, "cpu") == "sdpa"
    assert usual_attention(Qwen2Config(sliding_window=4096, use_sliding_window=False), "cuda") != "sdpa"
    assert usual_attention(Llama4TextConfig(attention_chunk_size=64), "cuda") == "sdpa"


def test_a_shared_beginning_is_not_run_again_and_changes_nothing(tiny_llama: Path, ids: torch.Tensor) -> None:
    first, other = ids[0].tolist(), ids[1].tolist()
    second = first[:130] + other[130:180]
    ours = engine(tiny_llama, 50)
    run: list[int] = []
    ours.model.register_forward_pre_hook(lambda module, args: run.append(args[0].shape[1]))
    for prompt, chunks in (
        (first, [50, 50, 50, 42]),
        (second, [50, 30]),  # 130 tokens in common: two whole chunks
        (second, [30]),  # the last chunk runs for its logits
        (first[:100], [50]),
        (other, [50, 50, 50, 42]),
    ):
        run.clear()
        assert torch.equal(ours.prefill(prompt), engine(tiny_llama, 50).prefill(prompt)), "as from a fresh engine"
        assert run == chunks
        ours.answer(prompt, 3)  # leaves tokens of its answer in the cache


def changed_copy(tiny_llama: Path, folder: Path, **changes: Any) -> Path:
    """The same weights and tokenizer under another config.json."""
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


SLIDING = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 40}


def transformers_answer(folder: Path, prompt: list[int], new_tokens: int) -> str:
    """By transformers alone, of a model that was asked nothing before."""
    fresh = engine(folder, 1000)
    eos = sorted(fresh.stop_ids)
    asked: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": eos}
    ids = torch.tensor([prompt])
    written: Any = fresh.model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    return fresh.tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)


def transformers_scores(folder: Path, prompt: list[int], continuations: list[list[int]]) -> list[float]:
    """Each in one pass behind the prompt, without a cache."""
    model = engine(folder, 1000).model
    scores = []
    for ids in continuations:
        rows = whole_logits(model, torch.tensor([prompt + ids]))[0].log_softmax(-1)  # [seq, vocab]
        scores.append(sum(float(rows[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))
    return scores


def test_a_sliding_window_is_read_anew_for_every_prompt(tiny_llama: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    """Its cache has dropped what a shorter beginning would need."""
    folder = changed_copy(tiny_llama, tmp_path / "sliding", **SLIDING)
    first, other = ids.tolist()
    ours = engine(folder, 50)
    for prompt in (first, first[:130] + other[130:180], first[:100], first):
        assert ours.answer(prompt, 12, stop=()) == transformers_answer(folder, prompt, 12)
    continuations = [[7, 8, 9], [11], [12, 13], [14, 15, 16, 17]]
    scores = [score for score, _ in ours.continuation_scores(first, continuations)]
    np.testing.assert_allclose(scores, transformers_scores(folder, first, continuations), atol=1e-3)
    losses = ours.token_losses(ids[0].numpy().astype(np.int32))
    expected = torch.nn.functional.cross_entropy(whole_logits(ours.model, ids)[0, :-1], ids[0, 1:], reduction="none")
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 6.0]},
}


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE])
def test_angles_by_length_are_those_of_the_prompt_alone(
    tiny_llama: Path, tmp_path: Path, ids: torch.Tensor, rope: dict[str, Any]
) -> None:
    """Not of its chunks, and not of what was asked before; some prompts stay within the window, one grows out of it."""
    folder = changed_copy(tiny_llama, tmp_path / "by_length", rope_parameters=rope)
    first, other = ids.tolist()
    ours = engine(folder, 50)
    for prompt in (first, first[:100], other[:60], other[:100], other[:30], first[:180]):
        assert ours.answer(prompt, 12, stop=()) == transformers_answer(folder, prompt, 12), len(prompt)
    continuations = [[7, 8, 9], [11], [7, 8, 9]]
    alone = [engine(folder, 50).continuation_scores(first, [each])[0] for each in continuations]
    assert ours.continuation_scores(first, continuations) == alone
    losses = ours.token_losses(ids[0, :150].numpy().astype(np.int32))
    whole = whole_logits(engine(folder, 1000).model, ids[:1, :149])[0]
    expected = torch.nn.functional.cross_entropy(whole, ids[0, 1:150], reduction="none")
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1000, 50])
def test_token_losses_equal_one_pass(tiny_llama: Path, ids: torch.Tensor, chunk: int) -> None:
    ours = engine(tiny_llama, chunk)
    losses = ours.token_losses(ids[0].numpy().astype(np.int32))
    expected = torch.nn.functional.cross_entropy(whole_logits(ours.model, ids)[0, :-1], ids[0, 1:], reduction="none")
    assert losses.shape == (LENGTH - 1,) and losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_losses_of_a_family_that_scales_its_logits_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 4.0}
    folder = changed_copy(tiny_llama, tmp_path / "granite", **granite)
    with pytest.raises(UserError, match=r"model_type is 'granite'.*llama, qwen2, qwen3, mistral"):
        engine(folder, 50).token_losses(np.arange(10, 40, dtype=np.int32))


def test_answers_are_transformers_greedy_answers(tiny_llama: Path, ids: torch.Tensor) -> None:
    ours = engine(tiny_llama, 50)
    ours.stop_ids = set()
    for row in ids:
        theirs: Any = ours.model.generate(row[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
        text = ours.tokenizer.decode(theirs[0, LENGTH:], skip_special_tokens=True)
        assert ours.answer(row.tolist(), 6) == text.lstrip().split("\n", 1)[0]


class Scripted:
    """A model that says the given tokens, whatever it is asked."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.calls, self.config = tokens, 0, None

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(1, 1, 400)
        logits[0, 0, self.tokens[self.calls]] = 1.0
        self.calls += 1
        return type("Output", (), {"logits": logits})


def test_answers_stop_at_eos_newline_and_limit(tiny_llama: Path) -> None:
    ours = engine(tiny_llama, 1000)
    one, two, newline = (ours.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("1", "2", "\n"))
    eos = ours.tokenizer.eos_token_id
    for tokens, limit, answer, calls in (
        ([newline, one, newline, two], 8, "1", 3),  # a newline before any text does not stop it
        ([one, two, eos, two], 8, "12", 3),
        ([one, one, one, one], 3, "111", 3),
        ([eos], 8, "", 1),
    ):
        ours.model = Scripted(tokens)
        assert (ours.answer([5], limit), ours.model.calls) == (answer, calls)


def test_angles_are_those_that_the_folder_names(tiny_llama: Path, tmp_path: Path) -> None:
    """A far position, computed as config.json says the model was trained; the base says nothing: as transformers."""
    trained = tmp_path / "trained"
    shutil.copytree(tiny_llama, trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "rotary_angles": "exact"}))
    far = torch.tensor([[4_194_303]])
    frequency = 10_000.0 ** (-2 / 8)  # of pair 1
    errors = []
    for folder in (trained, tiny_llama):
        _, sin = engine(folder, 50).model.model.rotary_emb(torch.zeros(1), position_ids=far)  # [1, 1, head_dim]
        errors.append(abs(sin[0, 0, 1].item() - math.sin(4_194_303 * frequency)))
    assert errors[0] < 1e-6 and errors[1] > 1e-3
