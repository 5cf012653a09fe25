"""Export: the folder loads anywhere, answers as the model in memory does, and its card states the run's facts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ultralong_ray.config import Recipe
from ultralong_ray.export import export
from ultralong_ray.model.extend import extend
from ultralong_ray.model.rope import from_hf
from ultralong_ray.model.save import save_hf_folder
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

Make = Callable[..., Recipe]
PROVENANCE = {"pretrain": {"stage": "pretrain", "steps": 17, "tokens": 8704, "loss": [1, 2]}, "sft": {"steps": 3}}


def extended_model(recipe: Recipe) -> tuple[Any, Location]:
    """The extended model in memory, a little changed as by training, and the folder it was read from."""
    stage = stage_directory(recipe, "extend")
    extend(recipe, stage)
    folder = stage.location / "model"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder.path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), folder


def exported(recipe: Recipe, tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
    model, source = extended_model(recipe)
    trained = Location.of(tmp_path / "trained")
    save_hf_folder(trained, source, model.state_dict().items(), torch.float32)
    stage = stage_directory(recipe, "export")
    summary = export(recipe, trained, stage, PROVENANCE)
    return model, Path((stage.location / "model").path), summary


@pytest.mark.parametrize("scheme", ["llama3", "ntk", "linear", "yarn"])
def test_exported_logits_equal_in_process_logits_beyond_the_base_window(
    tiny_recipe: Make, tmp_path: Path, scheme: str
) -> None:
    recipe = tiny_recipe(model={"rope": {"scheme": scheme, "factor": 8.0}})
    model, folder, summary = exported(recipe, tmp_path)
    ids = torch.randint(10, 300, (1, 400), generator=torch.Generator().manual_seed(5))  # the base window is 64
    fresh: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        difference = (fresh(ids).logits - model(ids).logits).abs().max().item()
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.base).eval()
        fresh.model.rotary_emb = base.model.rotary_emb
        without_rope_change = (fresh(ids).logits - model(ids).logits).abs().max().item()
    assert difference <= 1e-4
    assert without_rope_change > 0.1, "the comparison would see a lost RoPE block"
    assert summary["num_parameters"] == sum(p.numel() for p in model.parameters())


def test_pipeline_loads_the_folder_and_the_card_states_the_run(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    _, folder, _ = exported(recipe, tmp_path)
    pipeline: Any = transformers.pipeline("text-generation", model=str(folder))
    messages = [{"role": "user", "content": "What is the pass key?"}]
    reply = pipeline(messages, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert reply[:-1] == messages and reply[-1]["role"] == "assistant"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in ("factor 8 ", "measured from 64 tokens", "'rope_type': 'llama3'", "learning rate 0.001", "512 tokens"):
        assert fact in card, fact
    assert "trained with exact rotary angles" in card and "by up to 1.5e-05 rad at 512 tokens" in card
    assert json.loads((folder / "config.json").read_text())["rotary_angles"] == "exact"
    assert "| pretrain | steps | 17 |" in card and "| sft | steps | 3 |" in card and "[1, 2]" not in card


def test_what_a_killed_export_left_is_not_published(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    target = stage_directory(recipe, "export").location / "model"
    (target / "model.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (target / "tmp1a2b3c" / "model-00001.safetensors").write_bytes(b"half")
    _, folder, _ = exported(recipe, tmp_path)
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("tmp*"))
    assert (folder / "model.safetensors").exists()


def test_a_model_of_float32_angles_says_so(tiny_recipe: Make, tmp_path: Path) -> None:
    _, folder, _ = exported(tiny_recipe(model={"rope": {"factor": 8.0, "angles": "float32"}}), tmp_path)
    assert json.loads((folder / "config.json").read_text())["rotary_angles"] == "float32"
    assert "exact" not in (folder / "README.md").read_text()


def test_the_rounding_on_the_card_is_that_of_the_fastest_pair(tiny_recipe: Make, tmp_path: Path) -> None:
    """Interpolation slows every pair: at 512 tokens and factor 8 no angle is beyond 64 rad."""
    _, folder, _ = exported(tiny_recipe(model={"rope": {"scheme": "linear", "factor": 8.0}}), tmp_path)
    assert "by up to 1.9e-06 rad at 512 tokens" in (folder / "README.md").read_text()


def test_the_card_names_the_longest_sequences_of_either_training(tiny_recipe: Make, tmp_path: Path) -> None:
    _, folder, _ = exported(tiny_recipe(prepare={"sequence_length": 256}), tmp_path)  # SFT: 512
    card = (folder / "README.md").read_text()
    assert "not trained on sequences longer than 512 tokens" in card and "rad at 512 tokens" in card


def as_older(config: dict[str, Any]) -> dict[str, Any]:
    """What a reader that knows no `rope_parameters` and no `dtype` sees."""
    return {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}


@pytest.mark.parametrize("scheme", ["llama3", "ntk", "linear", "yarn", "none"])
def test_readers_of_the_older_spelling_find_the_same_rope_and_dtype(
    tiny_recipe: Make, tmp_path: Path, scheme: str
) -> None:
    """transformers 4.x ignores `rope_parameters`: without a word it would run the model unstretched, theta 10000."""
    recipe = tiny_recipe(model={"rope": {"scheme": scheme, "factor": 8.0}})
    _, folder, _ = exported(recipe, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert from_hf(as_older(config)) == from_hf(config)
    assert {"rope_theta", "type"}.isdisjoint(config["rope_scaling"] or {})  # 4.x warns of keys that it does not know
    assert config["torch_dtype"] == config["dtype"] == "float32"
    written = json.loads((tmp_path / "trained" / "config.json").read_text())["rope_parameters"]
    assert transformers.AutoConfig.from_pretrained(folder).rope_parameters == written


def test_a_config_without_a_dtype_is_exported_as_it_is(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    trained = tmp_path / "trained"
    shutil.copytree(recipe.model.base, trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    found = export(recipe, Location.of(trained), stage_directory(recipe, "export"), {})
    assert found["dtype"] == "float32"


def test_a_kernel_named_in_the_config_need_not_be_installed_here(tiny_recipe: Make, tmp_path: Path) -> None:
    """Export runs on a CPU node, and only after the training."""
    recipe = tiny_recipe()
    trained = tmp_path / "trained"
    shutil.copytree(recipe.model.base, trained)
    config = json.loads((trained / "config.json").read_text()) | {"attn_implementation": "flash_attention_2"}
    (trained / "config.json").write_text(json.dumps(config))
    assert export(recipe, Location.of(trained), stage_directory(recipe, "export"), {})["dtype"] == "float32"


def test_every_chat_template_is_kept(tiny_recipe: Make, tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    _, folder, _ = exported(tiny_recipe(model={"base": str(base)}), tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected keys: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "mismatched keys: .*model.norm.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight has values that are not finite"),
    ],
)
def test_a_folder_that_is_not_its_config_is_refused(tiny_recipe: Make, tmp_path: Path, edit: Any, words: str) -> None:
    recipe = tiny_recipe()
    trained = tmp_path / "trained"
    shutil.copytree(recipe.model.base, trained)
    change(trained, edit)
    with pytest.raises(UserError, match=words):
        export(recipe, Location.of(trained), stage_directory(recipe, "export"), {})
