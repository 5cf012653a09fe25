"""A small real BPE tokenizer, trained here, and places of the shared samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import S3_KEYS

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)


def _train_tokenizer(special_tokens: list[str], **options: Any) -> Any:
    """Byte-level BPE of at most 400 entries, as a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 4, "import os\nreturn os.path"], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.fixture(scope="session")
def train_tokenizer() -> Callable[..., Any]:
    return _train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    fast = _train_tokenizer(
        ["<|begin|>", "<|end|>", "<|turn|>", "<|pad|>"],
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray whose workers have the keys of the S3 servers."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def shared_data() -> Path:
    if not (SHARED / "data" / "corpus").is_dir():
        pytest.skip("the shared sample corpus is not beside this checkout")
    return SHARED / "data"
