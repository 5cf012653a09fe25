"""Separators as ids, plain-text encoding, and what is said of a tokenizer that lacks something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultralong_ray.data.tokenize import encode_batch, load_tokenizer, pad_token_id, separator_ids
from ultralong_ray.types import UserError


def test_pieces_are_the_ids_of_ordinary_text(tokenizer: Any) -> None:
    before, after = separator_ids(tokenizer, "<s>", "pieces")
    assert before == [] and len(after) > 1
    assert tokenizer.decode(after) == "<s>"
    assert not set(after) & set(tokenizer.all_special_ids)


def test_llama3_shaped_tokenizer_has_no_special_separator(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "dolma2-llama3-shaped"))
    assert separator_ids(tokenizer, "<s>", "pieces") == ([], [45147, 29])
    assert separator_ids(tokenizer, "bos_eos") == ([128000], [128009])
    with pytest.raises(UserError, match="no entry of the tokenizer's vocabulary"):
        separator_ids(tokenizer, "<s>", "token")


def test_special_separator_is_refused_as_pieces_and_taken_as_token(train_tokenizer: Any) -> None:
    tokenizer = train_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match="is a special token"):
        separator_ids(tokenizer, "<s>", "pieces")
    assert separator_ids(tokenizer, "<s>", "token") == ([], [tokenizer.bos_token_id])


def test_bos_eos_and_none(tokenizer: Any, train_tokenizer: Any) -> None:
    assert separator_ids(tokenizer, "bos_eos") == ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    assert separator_ids(tokenizer, "none") == ([], [])
    with pytest.raises(UserError, match="no BOS and EOS token"):
        separator_ids(train_tokenizer([]), "bos_eos")


def test_special_tokens_in_a_document_are_ordinary_text(tokenizer: Any) -> None:
    text = "the fox <|end|> quotes <|begin|>"
    (ids,) = encode_batch(tokenizer, [text])
    assert ids.dtype == np.int32
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    # and the tokenizer is left as it was: a chat template's tokens are still special afterwards
    assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_padding_falls_back(tokenizer: Any, train_tokenizer: Any) -> None:
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    assert pad_token_id(train_tokenizer(["</s>"], eos_token="</s>")) == 0
    assert pad_token_id(train_tokenizer([])) == 0


def test_loading(tokenizer: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(tokenizer_folder)).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(f"file://{tokenizer_folder}").get_vocab() == tokenizer.get_vocab()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    for content in ("{}", "[]", "null"):
        (tmp_path / "empty" / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no tokenizer could be loaded"):
            load_tokenizer(str(tmp_path / "empty"))
