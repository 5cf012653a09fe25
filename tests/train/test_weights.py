"""Reading a Hugging Face folder's shards into a model: what is ignored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parallel.spawn import plan, section, write_model
from tests.train.made_engine import world_of_one
from ultralong_ray.storage import Location
from ultralong_ray.train.weights import build_model
from ultralong_ray.types import UserError

BELOW_ZERO3 = {"zero_optimization": {"stage": 0}}


def built_with(folder: Path, extra: str) -> torch.nn.Module:
    """The model of a folder whose shard has one more tensor."""
    shard = Path(write_model(folder, kv_heads=2).path) / "model.safetensors"
    save_file(load_file(shard) | {extra: torch.ones(4)}, shard, metadata={"format": "pt"})
    return built(folder)


def built(folder: Path) -> torch.nn.Module:
    with world_of_one(folder):
        return build_model(Location.of(folder), None, section(), plan(1, 1, 2), BELOW_ZERO3, torch.device("cpu"))


def test_frequencies_stored_by_old_releases_are_not_read(tmp_path: Path) -> None:
    """Llama 2 checkpoints of their time hold them for every layer; the extended model has frequencies of its own."""
    module = built_with(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq")
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, stored[name.removeprefix("causal_lm.")]), name


def test_a_tensor_that_the_config_has_no_place_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: tensor model\.extra\.weight is unknown to the model"):
        built_with(tmp_path, "model.extra.weight")


def test_a_tied_head_stored_as_another_tensor_is_refused(tmp_path: Path) -> None:
    """Whichever came last would win, the embedding itself in a later shard."""
    folder = Path(write_model(tmp_path, kv_heads=2).path)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    assert torch.equal(dict(built(folder).named_parameters())["causal_lm.model.embed_tokens.weight"], embedding)
    save_file(tensors | {"lm_head.weight": embedding + 1.0}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"differs from what is stored for the same parameter"):
        built(folder)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    shard = Path(write_model(tmp_path, kv_heads=2).path) / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        built(tmp_path)
