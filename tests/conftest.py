"""Shared fixtures: a tiny random Llama with a tokenizer trained on the spot, and a recipe that extends it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests import fault_proxy
from tests.fault_proxy import FaultProxy
from tests.machine import free_ports, http_server
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
BUCKET = "ultralong-test"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "ak", "AWS_SECRET_ACCESS_KEY": "sk", "AWS_REGION": "us-east-1"}

SLOW = "ULTRALONG_SLOW_TESTS"  # environment variable that switches on tests marked slow
# Files of a minute and more. They begin first: two processes share the tests by file, and none is to end with one.
LONG = (
    *("test_whole_recipe.py", "test_kill_schedule.py", "test_fanout.py", "test_sharded.py", "test_trainer.py"),
    *("test_checkpoint.py", "test_numerics.py", "test_other_sizes.py", "test_beside.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
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


@pytest.fixture(scope="session", autouse=True)
def own_ray() -> Iterator[None]:
    """No test joins a Ray that runs on this machine, nor is told of one; sessions go to a folder that is removed."""
    folder = tempfile.mkdtemp(prefix="ulr", dir="/tmp")  # short: Ray's socket paths are limited
    (Path(folder) / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that speaks the S3 protocol (moto, from the s3-test extra), with one bucket."""
    pytest.importorskip("moto.server", reason="the s3-test extra is not installed")
    import boto3

    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with http_server(command, endpoint, tmp_path_factory.mktemp("moto") / "log"):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in S3_KEYS.items():
                patch.setenv(name, value)
            boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in that bucket where nothing is yet; the environment leads there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3_server: str, s3_uri: str) -> Iterator[FaultProxy]:
    """Before that server one that fails when it is told to."""
    port = urlsplit(s3_server).port
    assert port is not None
    with fault_proxy.running(port) as running:
        yield running
