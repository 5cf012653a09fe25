"""How the ablations' variants are called and grouped, as jobs/recipes/reproduction/ablations.toml has them."""

from __future__ import annotations

from collections.abc import Iterable

RECIPE_LABEL = "the recipe"
GROUPS = {
    "Separator and mask": {
        "separator_none": "no separator",
        "separator_bos_eos": "BOS and EOS, not <s>",
        "document_mask": "mask between documents",
    },
    "RoPE": {
        "rope_ntk": "NTK-aware",
        "rope_linear": "linear",
        "rope_yarn_with_temperature": "YaRN with temperature",
        "ramp_1_32": "ramp 1 to 32, not 1 to 4",
        "ramp_half_2": "ramp 0.5 to 2",
        "factor_16": "factor 16, not 32",
        "factor_64": "factor 64",
    },
    "Data": {
        "no_upsampling": "no length upsampling",
        "no_short_documents": "no short documents",
        "two_steps": "two steps: 32K, 128K",
    },
    "Tokens": {
        "tokens_2m": "2M tokens, not 4M",
        "tokens_8m": "8M tokens",
        "tokens_16m": "16M tokens",
    },
    "Step size": {
        "learning_rate_4e-4": "4e-4, not 2e-4",
        "learning_rate_8e-4": "8e-4",
    },
    "SFT": {
        "sft_short": "SFT on short samples",
        "sft_with_long": "SFT, long ones among them",
    },
}


def label(variant: str) -> str:
    return next((names[variant] for names in GROUPS.values() if variant in names), variant.replace("_", " "))


def grouped(variants: Iterable[str]) -> dict[str, list[str]]:
    """Group -> those of `variants` in it, in the order above; unknown ones come last, the recipe is left out."""
    left = [variant for variant in variants if variant != "recipe"]
    found = {group: [name for name in names if name in left] for group, names in GROUPS.items()}
    known = {name for names in GROUPS.values() for name in names}
    found["Other"] = [name for name in left if name not in known]
    return {group: names for group, names in found.items() if names}
