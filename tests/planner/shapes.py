"""The model and the recipes that the planner's tests speak about."""

from __future__ import annotations

from pathlib import Path

from ultralong_ray.config import Recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.recipe import load_recipe
from ultralong_ray.types import LayerKeep, TrainPlan

ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256)
FREE = ("pretrain.sequence_parallel_degree=auto", "sft.sequence_parallel_degree=auto")


def llama_recipe(tag: str, *overrides: str) -> Recipe:
    """A shipped recipe ("1m", "2m", "4m") with its degrees left to the planner."""
    return load_recipe(str(ROOT / "jobs" / "recipes" / f"llama31_8b_{tag}.toml"), [*FREE, *overrides])


def layout(
    ulysses: int = 4,
    ring: int = 1,
    keep: LayerKeep | None = None,
    layers: int = 32,
    mlp_tile: int = 16_384,
    offload: bool = False,
) -> TrainPlan:
    return TrainPlan(ulysses, ring, (keep or LayerKeep(),) * layers, mlp_tile, 2_048, offload)
