"""Stage `extend`: what it writes, and every base that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultralong_ray.config import Recipe
from ultralong_ray.model.extend import extend
from ultralong_ray.model.rope import inv_freq
from ultralong_ray.stages import stage_directory
from ultralong_ray.types import UserError

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
Make = Callable[..., Recipe]


def run(recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    stage = stage_directory(recipe, "extend")
    summary = extend(recipe, stage)
    return Path(stage.location.path) / "model", summary


@pytest.fixture
def changed_base(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """A copy of the tiny model with fields of config.json changed (None removes one)."""

    def make(**fields: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_llama, folder)
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make


def test_extended_model_loads_with_the_new_window_and_the_same_weights(tiny_recipe: Make, tiny_llama: Path) -> None:
    recipe = tiny_recipe(model={"architecture": SHAPE, "max_position_embeddings": 544})
    folder, summary = run(recipe)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.max_position_embeddings == 544
    assert model.config.rotary_angles == "exact"
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 544
    expected = inv_freq(recipe.model.rope, 8, 10_000.0, 64)
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), expected, rtol=1e-6)
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert summary["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_old_spelling_of_rope_is_replaced(tiny_recipe: Make, changed_base: Callable[..., Path]) -> None:
    old = {"type": "linear", "factor": 2.0}
    base = changed_base(rope_parameters=None, rope_scaling=old, rope_theta=20_000.0, torch_dtype="float32", dtype=None)
    folder, summary = run(tiny_recipe(model={"base": str(base)}))
    config = json.loads((folder / "config.json").read_text())
    assert not {"rope_scaling", "rope_theta", "torch_dtype"} & config.keys() and config["dtype"] == "float32"
    assert config["rope_parameters"]["rope_theta"] == 20_000.0
    assert (summary["base_rope_scheme"], summary["base_rope_factor"]) == ("linear", 2.0)


def test_the_original_length_is_the_recipes(tiny_recipe: Make, changed_base: Callable[..., Path]) -> None:
    """Beside the RoPE block transformers takes this field before the one inside."""
    recipe = tiny_recipe(model={"base": str(changed_base(original_max_position_embeddings=32))})
    folder, _ = run(recipe)
    found: Any = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    np.testing.assert_allclose(found.numpy(), inv_freq(recipe.model.rope, 8, 10_000.0, 64), rtol=1e-6)


@pytest.mark.parametrize("written", [None, {}, {"eos_token_id": [1, 9]}], ids=["absent", "empty", "own"])
def test_answers_end_at_the_tokenizers_eos_where_nothing_else_is_said(
    tiny_recipe: Make, changed_base: Callable[..., Path], written: dict[str, Any] | None
) -> None:
    """A generation config without eos_token_id lets transformers write on behind the end of an answer."""
    base = changed_base(eos_token_id=None, bos_token_id=None)
    (base / "generation_config.json").unlink(missing_ok=True)
    if written is not None:
        (base / "generation_config.json").write_text(json.dumps(written))
    folder, _ = run(tiny_recipe(model={"base": str(base)}))
    from transformers import AutoModelForCausalLM

    ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert ends == ([1, 9] if written else 1)


def test_random_init_writes_a_config_that_builds_a_model(tiny_recipe: Make) -> None:
    for model_type in ("llama", "qwen2", "qwen3", "mistral"):
        shape = SHAPE | {"model_type": model_type, "head_dim": 8, "tie_word_embeddings": True}
        folder, summary = run(tiny_recipe(model={"init": "random", "architecture": shape}))
        assert not list(folder.glob("*.safetensors")) and summary["num_parameters"] is None
        from transformers import AutoConfig

        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
        assert model.config.tie_word_embeddings and model.model.layers[0].mlp.up_proj.out_features == 48
        assert getattr(model.config, "sliding_window", None) is None
        assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    ("fields", "model", "words"),
    [
        ({"model_type": "gpt2"}, {}, "model_type 'gpt2'.*llama"),
        ({}, {"architecture": SHAPE | {"hidden_size": 64}}, "hidden_size: recipe 64, base 32"),
        ({}, {"architecture": SHAPE | {"rope_theta": 5e5}}, r"rope_theta: recipe 500000\.0, base 10000\.0"),
        ({"model_type": "mistral", "sliding_window": 32}, {}, "sliding_window 32"),
        ({"attention_dropout": 0.1}, {}, "attention_dropout 0.1"),
        ({"model_type": "mistral"}, {}, "sliding_window 4096"),  # the default where config.json is silent
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 16.0, "rope_theta": 1e4}},
            {},
            "rope.factor 8 .*would shrink.*factor 16",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            {"rope": {"scheme": "none"}},
            "would shrink",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                }
            },
            {},
            "original_context_length 64 disagrees.*32",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "quantization_config gptq.*whole weights"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            {},
            "config.json describes no model that can be extended .*KeyError|has no factor",
        ),
        ({"rope_parameters": YARN | {"factor": "two"}}, {}, "no model that can be extended .*two"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, {}, "no model that can be extended .*factor"),
        ({"num_attention_heads": "four"}, {}, "no model that can be extended .*num_attention_heads"),
        ({"vocab_size": None}, {}, "has no vocab_size"),
        ({"max_position_embeddings": 32}, {}, "original_context_length 64 is beyond max_position_embeddings 32"),
        (
            {"rope_parameters": YARN | {"attention_factor": 1.0}},
            {"rope": {"scheme": "yarn", "factor": 8.0}},
            "attention_factor of its yarn RoPE would be lost",
        ),
        (
            {"intermediate_size": 64},
            {},
            r"6 stored tensors are not .*down_proj.weight is \[32, 48\], it has \[32, 64\]",
        ),
        ({"num_hidden_layers": 3}, {}, "9 stored tensors are not .*layers.2.* is not stored"),
        ({"num_hidden_layers": 1}, {}, "9 stored tensors are not .*layers.1.* is stored and unknown to it"),
        ({"vocab_size": 300}, {}, "tokenizer has ids up to 375.*vocab_size is 300; take out"),
    ],
)
def test_refusals(
    tiny_recipe: Make, changed_base: Callable[..., Path], fields: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    base = changed_base(**fields)
    with pytest.raises(UserError, match=words):
        run(tiny_recipe(model={"base": str(base), **model}))


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_are_named(tiny_recipe: Make, changed_base: Callable[..., Path], name: str) -> None:
    base = changed_base()
    (base / name).write_text('{"cut": ')
    with pytest.raises(UserError, match=rf"{name} is not valid JSON .*fetch the model again"):
        run(tiny_recipe(model={"base": str(base)}))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_too_must_be_the_embedding(
    tiny_recipe: Make, changed_base: Callable[..., Path], same: bool
) -> None:
    """transformers would keep both, training one of them."""
    base = changed_base(tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if same else embedding + 1.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny_recipe(model={"base": str(base)})
    if same:
        assert run(recipe)[1]["num_parameters"] == sum(t.numel() for t in tensors.values()) - embedding.numel()
        return
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*set it to false"):
        run(recipe)


def test_ntk_aware_scaling_is_measured_from_the_same_origin_again(tiny_recipe: Make, tmp_path: Path) -> None:
    once, _ = run(tiny_recipe(model={"rope": {"scheme": "ntk", "factor": 2.0}}))
    shutil.copytree(once, tmp_path / "once")
    recipe = tiny_recipe(model={"base": str(tmp_path / "once"), "rope": {"scheme": "ntk", "factor": 8.0}})
    folder, summary = run(recipe)
    found: Any = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    np.testing.assert_allclose(found.numpy(), inv_freq(recipe.model.rope, 8, 10_000.0, 64), rtol=1e-6)
    assert (summary["base_rope_scheme"], summary["base_rope_factor"]) == ("ntk", 2.0)
    shrinking = tiny_recipe(model={"base": str(folder), "rope": {"scheme": "ntk", "factor": 4.0}})
    with pytest.raises(UserError, match=r"factor 4 .*would shrink the window.*ntk factor 8"):
        run(shrinking)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {}}', "{}"])
def test_an_index_that_names_nothing_is_refused(
    tiny_recipe: Make, changed_base: Callable[..., Path], text: str
) -> None:
    base = changed_base()
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json (names no tensors|is a JSON list)"):
        run(tiny_recipe(model={"base": str(base)}))


def test_a_tokenizer_that_is_none_is_named(tiny_recipe: Make, changed_base: Callable[..., Path]) -> None:
    base = changed_base()
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer that transformers can read"):
        run(tiny_recipe(model={"base": str(base)}))


def test_pickled_weights_are_refused(tiny_recipe: Make, changed_base: Callable[..., Path]) -> None:
    base = changed_base()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        run(tiny_recipe(model={"base": str(base)}))


def test_truncated_weights_are_named(tiny_recipe: Make, changed_base: Callable[..., Path]) -> None:
    base = changed_base()
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
        run(tiny_recipe(model={"base": str(base)}))


def test_missing_base_is_named(tiny_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.base '.*/nowhere/at/all': no such folder"):
        run(tiny_recipe(model={"base": str(tmp_path / "nowhere/at/all")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        run(tiny_recipe(model={"base": str(tmp_path / "empty")}))
