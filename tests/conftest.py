"""Shared fixtures: a tiny random Llama with a tokenizer trained on the spot, and a recipe that extends it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import Recipe

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TINY_TEXT = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "There is an important info hidden inside a lot of irrelevant text. What is the pass key?",
    "0 1 2 3 4 5 6 7 8 9 The pass key is remembered and a quick brown fox jumps over it.",
]
TINY_WINDOW = 64  # tokens


SLOW = "ULTRALONG_SLOW_TESTS"  # environment variable that switches on tests marked slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(SLOW) == "1":
        return
    for item in items:
        if item.get_closest_marker("slow") is not None:  # keywords hold names of folders as well
            item.add_marker(pytest.mark.skip(reason=f"takes half a minute or more; set {SLOW}=1 to run it"))


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE in which every digit is a token, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    splits: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", model_max_length=TINY_WINDOW
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random Llama with a 64-token window. Copy it before changing it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.3,  # large, so that a wrong position or mask moves the logits well beyond rounding
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_llama: Path) -> Callable[..., Recipe]:
    """`tiny_recipe(model={...}, evaluate={...})`: a valid recipe with those sections changed."""

    def make(**changes: Any) -> Recipe:
        train = {"global_batch_sequences": 1, "learning_rate": 1e-3}
        source = {"kind": "files", "uri": str(tmp_path / "corpus")}
        sections: dict[str, Any] = {
            "name": "tiny",
            "workdir": str(tmp_path / "work"),
            "model": {
                "base": str(tiny_llama),
                "original_context_length": TINY_WINDOW,
                "base_context_length": TINY_WINDOW,
                "target_context_length": 8 * TINY_WINDOW,
                "rope": {"factor": 8.0},
            },
            "corpus": {"sources": [source]},
            "prepare": {"sequence_length": 512, "token_budget": 5120},
            "pretrain": train,
            "sft": {**train, "sources": [source], "sequence_length": 512, "max_sample_tokens": 512},
            "evaluate": {"context_lengths": [192, 256], "depths_percent": [0, 100], "samples_per_cell": 2},
        }
        for name, values in changes.items():
            sections[name] = {**sections.get(name, {}), **values}
        return Recipe.model_validate(sections)

    return make


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[str]:
    """A bucket on a server that speaks the S3 protocol (moto, from the s3-test extra)."""
    pytest.importorskip("moto.server", reason="the s3-test extra is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    endpoint = f"http://127.0.0.1:{port}"
    saved = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="ak", AWS_SECRET_ACCESS_KEY="sk", AWS_REGION="us-east-1"
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(endpoint, timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        import boto3

        boto3.client("s3").create_bucket(Bucket="ultralong-test")
        yield "s3://ultralong-test/run"
    finally:
        server.kill()
        os.environ.clear()
        os.environ.update(saved)
