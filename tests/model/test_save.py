"""Streaming weights into a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ultralong_ray.model.folder import weight_files
from ultralong_ray.model.save import save_hf_folder
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError


def reused_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor is overwritten as soon as the next one is asked for, as a ZeRO-3 stream may do."""
    for name, tensor in model.state_dict().items():
        lent = tensor.clone()
        yield name, lent
        lent.fill_(float("nan"))


@pytest.mark.parametrize(("max_shard_bytes", "sharded"), [(10**9, False), (60_000, True)])
def test_round_trip_in_shards(tiny_llama: Path, tmp_path: Path, max_shard_bytes: int, sharded: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    target, source = Location.of(tmp_path / "out"), Location.of(tiny_llama)
    save_hf_folder(target, source, reused_buffers(model), torch.float32, max_shard_bytes=max_shard_bytes)
    files = weight_files(tmp_path / "out")
    assert (len(files) > 1) == sharded and set((tmp_path / "out").glob("*.safetensors")) == set(files)
    assert all(path.stat().st_size < max_shard_bytes + 8192 for path in files)  # 8192: room for the header
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_tied_head_is_dropped_and_dtype_is_set(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "tied"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True, "torch_dtype": "float32"}))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    target = Location.of(tmp_path / "out")
    save_hf_folder(target, Location.of(base), model.state_dict().items(), torch.bfloat16)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)  # type: ignore[misc]
    assert again.dtype == torch.bfloat16 and not info["missing_keys"]
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert b"lm_head" not in (tmp_path / "out/model.safetensors").read_bytes()
    assert "torch_dtype" not in json.loads((tmp_path / "out/config.json").read_text())


def test_remote_target(tiny_llama: Path, tmp_path: Path) -> None:
    """Any URI scheme: here fsspec's memory filesystem."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    target = Location.of("memory://save-test/model")
    save_hf_folder(target, Location.of(tiny_llama), model.state_dict().items(), torch.float32, max_shard_bytes=60_000)
    names = {file.name for file in target.files()}
    assert {"model.safetensors.index.json", "config.json", "tokenizer.json", "model-00003.safetensors"} <= names


def test_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    target, source = Location.of(tmp_path / "out"), Location.of(tiny_llama)
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    with pytest.raises(UserError, match=r"tensor b .*not finite"):
        save_hf_folder(target, source, [("a", good), ("b", bad)], torch.float32)
    with pytest.raises(UserError, match="tensor a came twice"):
        save_hf_folder(target, source, [("a", good), ("a", good)], torch.float32)
    with pytest.raises(UserError, match="no weights"):
        save_hf_folder(target, source, [], torch.float32)
