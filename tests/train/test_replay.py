"""Replayed layers against plain autograd, for every way of keeping and every family of models.

The attention here is a plain one that honours `attention_context.kept`, computed in fixed blocks of rows, so that the
rows of a prefix are bit-equal to the same rows of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from ultralong_ray.parallel import mlp as mlp_module
from ultralong_ray.parallel.norm import install_fused_norms
from ultralong_ray.train.activation_store import ActivationStore
from ultralong_ray.train.replay import PREFIX_ROWS, install_replay, recomputed_rows
from ultralong_ray.types import LayerKeep, UserError

ROWS, LAYERS, BLOCK = 2 * PREFIX_ROWS, 3, 256
DEVICE, HOST = LayerKeep(), LayerKeep(inputs="host", attention="host")
HALF_DEVICE, HALF_HOST = LayerKeep(attention_rows=0.5), LayerKeep("host", "host", 0.5)
NOTHING = LayerKeep(attention_rows=0.0)
POLICIES = {
    "device": (DEVICE,) * LAYERS,
    "host": (HOST,) * LAYERS,
    "half on the device": (HALF_DEVICE,) * LAYERS,
    "half on the host": (HALF_HOST,) * LAYERS,
    "attention again": (NOTHING,) * LAYERS,
    "mixed": (HALF_HOST, LayerKeep("device", "host"), DEVICE),
}


@dataclass(frozen=True)
class Context:
    kept: Any = None


class BlockAttention(torch.autograd.Function):
    """Causal attention that keeps; `computed` counts the rows of query it worked on in forward passes."""

    computed: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: Any) -> torch.Tensor:
        rows = query.shape[1]
        tail = kept.load() if kept is not None and kept.replaying else None
        first = rows - (0 if tail is None else tail[0].shape[1])
        parts = [attend(query[:, at : at + BLOCK], key, value, at) for at in range(0, first, BLOCK)]
        BlockAttention.computed.append(first)
        outputs, lses = [part[0] for part in parts], [part[1] for part in parts]
        if tail is not None:
            outputs, lses = [*outputs, tail[0]], [*lses, tail[1]]
        output, lse = torch.cat(outputs, 1), torch.cat(lses, 2)
        if kept is not None and not kept.replaying:
            kept.save(output, lse)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grad = grads[0]
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        rows = torch.arange(query.shape[1])
        weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(rows[None, :] > rows[:, None], 0.0)
        inner = (grad * output).sum(-1).transpose(1, 2).unsqueeze(-1)  # [batch, heads, rows, 1]
        grad_scores = weights * (torch.einsum("bqhd,bkhd->bhqk", grad, value) - inner) * query.shape[-1] ** -0.5
        grad_query = torch.einsum("bhqk,bkhd->bqhd", grad_scores, key)
        grad_key = torch.einsum("bhqk,bqhd->bkhd", grad_scores, query)
        return grad_query, grad_key, torch.einsum("bhqk,bqhd->bkhd", weights, grad), None  # type: ignore[return-value]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    rows = torch.arange(at, at + query.shape[1])
    scores = scores.masked_fill(torch.arange(key.shape[1])[None, :] > rows[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", (scores - lse.unsqueeze(-1)).exp(), value), lse


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **others: Any
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1).transpose(1, 2) for tensor in (key, value))
    return BlockAttention.apply(query.transpose(1, 2), key, value, others["attention_context"].kept), None


AttentionInterface.register("keeping", attention)
AttentionMaskInterface.register("keeping", lambda *_, **__: None)


def model(model_type: str = "llama") -> Any:
    torch.manual_seed(7)
    shape = AutoConfig.for_model(
        model_type,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=31,
        max_position_embeddings=ROWS,
        pad_token_id=None,
    )
    made = AutoModelForCausalLM.from_config(shape, attn_implementation="keeping", dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return made.train()


def gradients(causal_lm: Any, passes: int = 1) -> dict[str, torch.Tensor]:
    """Of the summed squares of the last hidden state, over `passes` accumulated micro-batches."""
    for seed in range(passes):
        ids = torch.randint(0, 31, (2, ROWS), generator=torch.Generator().manual_seed(seed))
        positions = torch.arange(ROWS).expand(2, -1)
        hidden = causal_lm.model(
            input_ids=ids, position_ids=positions, use_cache=False, attention_context=Context()
        ).last_hidden_state
        (hidden * hidden.detach().sin()).sum().backward()
    return {name: p.grad.clone() for name, p in causal_lm.named_parameters() if p.grad is not None}


def replayed(keep: tuple[LayerKeep, ...], model_type: str = "llama") -> tuple[Any, ActivationStore]:
    causal_lm, store = model(model_type), ActivationStore(torch.device("cpu"))
    install_fused_norms(causal_lm)
    install_replay(causal_lm, keep, mlp_tile_tokens=700, store=store)
    return causal_lm, store


@pytest.fixture(scope="module")
def kept_on_device() -> dict[str, torch.Tensor]:
    return gradients(replayed(POLICIES["device"])[0])


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "device"])
def test_every_policy_gives_the_same_bits(policy: str, kept_on_device: dict[str, torch.Tensor]) -> None:
    found = gradients(replayed(POLICIES[policy])[0])
    assert found.keys() == kept_on_device.keys()
    assert [name for name in found if not torch.equal(found[name], kept_on_device[name])] == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_gradients_equal_plain_autograd(model_type: str) -> None:
    plain = gradients(model(model_type))
    found = gradients(replayed(POLICIES["mixed"], model_type)[0])
    extra = {"qwen2": "self_attn.q_proj.bias", "qwen3": "self_attn.q_norm.weight"}.get(model_type, "")
    assert any(name.endswith(extra) for name in plain)
    assert found.keys() == plain.keys() - {"lm_head.weight"}
    for name, gradient in found.items():
        # A key bias shifts every score of a row alike: its true gradient is zero, and only rounding is left of it.
        if not name.endswith("k_proj.bias"):
            assert float((gradient - plain[name]).norm() / plain[name].norm()) < 2e-6, name


@pytest.mark.parametrize(
    ("policy", "recomputed"), [("host", [0] * 3), ("half on the host", [512] * 3), ("attention again", [ROWS] * 3)]
)
def test_attention_computes_again_what_was_not_kept(policy: str, recomputed: list[int]) -> None:
    causal_lm, _ = replayed(POLICIES[policy])
    BlockAttention.computed.clear()
    gradients(causal_lm)
    assert BlockAttention.computed == [ROWS] * LAYERS + recomputed


def test_the_mlp_runs_forward_twice_not_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = mlp_module.gate_and_up
    monkeypatch.setattr(mlp_module, "gate_and_up", lambda rows, *rest: calls.append(len(rows)) or compute(rows, *rest))
    gradients(replayed(POLICIES["host"])[0])
    assert sum(calls) == 2 * LAYERS * 2 * ROWS


def test_the_mlp_value_of_the_replay_is_never_read(
    monkeypatch: pytest.MonkeyPatch, kept_on_device: dict[str, torch.Tensor]
) -> None:
    filled: list[int] = []

    def poison(hidden: torch.Tensor) -> torch.Tensor:
        filled.append(len(hidden))
        return torch.full_like(hidden, float("nan"))

    monkeypatch.setattr(mlp_module, "unread_output", poison)
    found = gradients(replayed(POLICIES["device"])[0])
    assert len(filled) == LAYERS
    assert all(torch.equal(found[name], kept_on_device[name]) for name in kept_on_device)


def test_accumulated_micro_batches_reuse_the_host_buffers() -> None:
    on_host, store = replayed(POLICIES["half on the host"])
    once = gradients(on_host)
    held = store.host_bytes
    # inputs [2, rows, 16], half of the outputs [2, rows, 2, 8] and of the log-sum-exps [2, 2, rows], float32
    assert held == LAYERS * 4 * ROWS * (2 * 16 + 2 * 16 // 2 + 2 * 2 // 2)
    assert store.device_bytes == 0
    on_host.zero_grad()
    twice, expected = gradients(on_host, 2), gradients(replayed(POLICIES["device"])[0], 2)
    assert store.host_bytes == held
    assert all(torch.equal(twice[name], expected[name]) for name in expected)
    assert any(not torch.equal(twice[name], once[name]) for name in once)


def test_a_step_that_fails_in_the_middle_leaves_a_usable_store(kept_on_device: dict[str, torch.Tensor]) -> None:
    causal_lm, store = replayed(POLICIES["mixed"])
    broken = causal_lm.model.layers[1].self_attn.o_proj.register_full_backward_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        gradients(causal_lm)
    broken.remove()
    causal_lm.zero_grad()
    found = gradients(causal_lm)
    assert all(torch.equal(found[name], kept_on_device[name]) for name in kept_on_device)
    assert store.device_bytes == 0


def stop(*_: Any) -> None:
    raise RuntimeError("stopped")


def test_evaluation_keeps_nothing() -> None:
    causal_lm, store = replayed(POLICIES["mixed"])
    gradients(causal_lm)  # and a training step before it changes nothing
    store.device_peak_bytes, held = 0, store.host_bytes
    with torch.no_grad():
        expected = model().model(input_ids=torch.ones(1, 8, dtype=torch.long), attention_context=Context())
        found = causal_lm.model(input_ids=torch.ones(1, 8, dtype=torch.long), attention_context=Context())
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-6, atol=1e-6)
    assert (store.device_peak_bytes, store.host_bytes) == (0, held)


def test_one_forward_pass_serves_one_backward_pass() -> None:
    causal_lm, _ = replayed(POLICIES["device"])
    ids = torch.ones(1, 8, dtype=torch.long)
    hidden = causal_lm.model(input_ids=ids, use_cache=False, attention_context=Context())[0]
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        hidden.sum().backward()


@pytest.mark.parametrize(
    ("rows", "share", "first"),
    [(2048, 1.0, 0), (2048, 0.5, 1024), (2048, 0.0, 2048), (2048, 0.6, 512), (1100, 0.5, 512), (700, 0.5, 0)],
)
def test_the_recomputed_prefix_is_whole_blocks_and_never_more_than_asked(rows: int, share: float, first: int) -> None:
    assert recomputed_rows(rows, share) == first


def test_a_policy_for_other_layers_or_another_mlp_is_refused() -> None:
    store = ActivationStore(torch.device("cpu"))
    with pytest.raises(ValueError, match="2 layers for a model of 3"):
        install_replay(model(), (DEVICE,) * 2, 8, store)
    gelu = model()
    gelu.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(UserError, match="GELU"):
        install_replay(gelu, POLICIES["device"], 8, store)
