"""Texts in, int32 token ids out; and the ids that stand between documents. Needs transformers, no torch, no Ray.

Read against transformers 5.17 and 5.23 and tokenizers 0.23: `encode_special_tokens` makes a tokenizer treat the text of
a special token as ordinary text, so that a document which quotes `<|eot_id|>` cannot end a turn; `encode_batch_fast`
leaves out the character offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ultralong_ray.storage import DEFAULT_OPTIONS, Location, default_cache, local_folder
from ultralong_ray.types import IntArray, StorageOptions, UserError

SEPARATOR_TEXT = "<s>"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@lru_cache(maxsize=4)
def load_tokenizer(base: str, revision: str | None = None, options: StorageOptions = DEFAULT_OPTIONS) -> Any:
    """The tokenizer of a Hugging Face folder (local path or URI) or hub id; code from the hub is never run.

    `options`: how an s3:// URI is reached. Raises UserError when there is none.
    """
    from transformers import AutoTokenizer

    name = _tokenizer_folder(base, options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it is no `tokenizers` one: tokenizer.json is missing")
        return tokenizer
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        # the last three: transformers looks into a tokenizer.json of other content unchecked
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"model.base {base!r}: no tokenizer could be loaded ({reason}). Give a folder that holds a whole "
            f"tokenizer.json, or a hub id that this machine can reach"
        ) from error


def _tokenizer_folder(base: str, options: StorageOptions) -> str:
    """A name that transformers understands: folders behind a URI are copied to the local disk without their weights."""
    if "://" not in base:
        folder = Path(base).expanduser()
        return str(folder) if folder.exists() else base
    cache = default_cache() / "tokenizers"  # beside whole models
    return str(local_folder(Location.of(base, options), cache, skip_suffixes=_WEIGHTS))


def separator_ids(tokenizer: Any, mode: str, encoding: str = "pieces") -> tuple[list[int], list[int]]:
    """(ids before every document, ids after every document) for `prepare.separator` and `separator_encoding`.

    "<s>" stands after each document, so between any two: the UltraLong recipe (arXiv 2504.06214, section 3.1), whose
    `<s>` is not the reserved begin or end of text. "pieces" are the tokens of ordinary text, "token" one vocabulary
    entry. Raises UserError when the tokenizer cannot give what is asked.
    """
    if mode == "none":
        return [], []
    if mode == "bos_eos":
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None or eos is None:
            lacking = " and ".join(n for n, i in (("BOS", bos), ("EOS", eos)) if i is None)
            raise UserError(
                f'prepare.separator = "bos_eos", but the tokenizer has no {lacking} token; use separator = "<s>"'
            )
        return [bos], [eos]
    return [], _single_entry(tokenizer) if encoding == "token" else _plain_pieces(tokenizer)


def _single_entry(tokenizer: Any) -> list[int]:
    index = tokenizer.get_vocab().get(SEPARATOR_TEXT)
    if index is None:
        raise UserError(
            f'prepare.separator_encoding = "token", but {SEPARATOR_TEXT!r} is no entry of the tokenizer\'s vocabulary; '
            f'use separator_encoding = "pieces"'
        )
    return [index]


def _plain_pieces(tokenizer: Any) -> list[int]:
    ids = list(tokenizer(SEPARATOR_TEXT, add_special_tokens=False)["input_ids"])
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if special & set(ids):
        raise UserError(
            f'prepare.separator_encoding = "pieces", but {SEPARATOR_TEXT!r} is a special token of this tokenizer '
            f'(ids {ids}); use separator_encoding = "token" or separator = "bos_eos"'
        )
    decoded = tokenizer.decode(ids)
    if tokenizer.unk_token_id in ids or decoded.strip() != SEPARATOR_TEXT:
        raise UserError(
            f"prepare.separator {SEPARATOR_TEXT!r} becomes ids {ids} in this tokenizer, which read back as {decoded!r};"
            f' use separator = "bos_eos" or "none"'
        )
    return ids


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[IntArray]:
    """Ids of each text as plain text, without special tokens: one int32 [num_tokens] array per text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens, before = True, backend.encode_special_tokens
    try:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills a sequence's unused end; never a target, so any id does."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in candidates if i is not None), 0)
