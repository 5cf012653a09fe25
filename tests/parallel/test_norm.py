"""The fused norm against the Hugging Face module that it replaces."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong_ray.parallel.norm import install_fused_norms


def model() -> Any:
    torch.manual_seed(2)
    shape = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    made = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter))
    return made


def norms(causal_lm: Any) -> list[Any]:
    pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in causal_lm.model.layers]
    return [causal_lm.model.norm, *(norm for pair in pairs for norm in pair)]


def test_every_layer_norm_and_the_last_one_equal_the_original() -> None:
    plain, fused = model(), model()
    install_fused_norms(fused)
    for original, replaced in zip(norms(plain), norms(fused), strict=True):
        assert "forward" in vars(replaced)
        for scale in (1e-3, 1.0, 1e3):  # the epsilon counts at the first
            rows = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)) * scale
            results = []
            for norm in (original, replaced):
                hidden = rows.clone().requires_grad_()
                output = norm(hidden)
                results.append((output.detach(), *torch.autograd.grad(output.sin().sum(), [hidden, norm.weight])))
            for one, other in zip(*results, strict=True):
                assert float((one - other).norm() / other.norm()) < 1e-6


def test_a_bfloat16_norm_is_at_least_as_exact_as_the_original() -> None:
    plain, fused = model().to(torch.bfloat16), model().to(torch.bfloat16)
    install_fused_norms(fused)
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = plain.model.norm.float()(rows.float()).detach()
    plain.model.norm.to(torch.bfloat16)
    errors = [float((norm(rows).detach().float() - exact).norm()) for norm in (fused.model.norm, plain.model.norm)]
    assert errors[0] <= errors[1]
    assert fused.model.norm(rows).dtype == torch.bfloat16
