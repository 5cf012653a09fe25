"""Long texts in, pieces out that have the same tokens: where byte-level BPE can be cut. Pure.

Memory of a tokenizer grows with the text of one call, some 100 bytes per character, so a document of 100M characters
has to be cut. A cut is made before a space that follows anything but white space, and between a letter or digit of any
script and the line feed or the Chinese, Japanese, Arabic or Indic punctuation behind it. It leaves the tokens as they
are when

- text is split into words by one of the known patterns below, and BPE works within words: no alternative of these
  patterns takes a space but at its start or among other white space, nor a letter or digit together with a line feed or
  punctuation behind it, so a word ends there with and without the rest of the text; and none looks behind, so the words
  after the cut are those of the rest alone;
- the normaliser is none or NFC: none of the characters on either side of a cut composes with the other;
- no added token contains white space or a cut, or swallows white space (`lstrip`, `rstrip`): none lies across a cut.

Other tokenizers (SentencePiece-like ones look at whole texts) get a text whole up to `WHOLE_CHARACTERS`; beyond that
the same cuts are made, and the tokens next to a cut may differ from those of one call. The patterns are GPT-2's (built
into the ByteLevel pre-tokenizer), and those in the tokenizer.json of cl100k, Llama 3, Qwen 2 and o200k.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

PIECE_CHARACTERS = 2**20
WHOLE_CHARACTERS = 2**24
_CUT = re.compile(r"\S(?= )|[^\W_](?=[\n\u3002\uff0c\u3001\uff01\uff1f\u060c\u061f\u0964])")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_PATTERNS = frozenset(
    {
        *(_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + _REST for digits in (r"\p{N}{1,3}", r"\p{N}")),
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
        r"\s*[\r\n]|\s+(?!\S)|\s+",
        _O200K,
    }
)


def cuts_are_exact(tokenizer: Any) -> bool:
    """Whether the rules above hold for this tokenizer, so that its pieces have the tokens of the whole text."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, splitter = parts["normalizer"], parts["pre_tokenizer"]
    splitters = splitter.get("pretokenizers", [splitter]) if splitter else []
    added = parts["added_tokens"]
    return (
        parts["model"]["type"] == "BPE"
        and (normalizer is None or normalizer["type"] == "NFC")
        and _splits_words(splitters)
        and not any(token["lstrip"] or token["rstrip"] or _may_lie_across(token["content"]) for token in added)
    )


def _may_lie_across(added_token: str) -> bool:
    return bool(re.search(r"\s", added_token) or _CUT.search(added_token))


def _splits_words(splitters: list[dict[str, Any]]) -> bool:
    """Whether the pre-tokenizer is Digits at most, then one known pattern, then bytes."""
    splitters = [s for s in splitters if s["type"] != "Digits"]
    if not splitters or splitters[-1]["type"] != "ByteLevel" or splitters[-1]["add_prefix_space"]:
        return False
    if len(splitters) == 1:
        return bool(splitters[0].get("use_regex", True))
    first = splitters[0]
    return (
        len(splitters) == 2
        and not splitters[1].get("use_regex", True)
        and first["type"] == "Split"
        and first["pattern"].get("Regex") in KNOWN_PATTERNS
        and (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    )


def pieces(text: str, *, exact: bool) -> Iterator[str]:
    """Consecutive pieces of a text, of about `PIECE_CHARACTERS` each; a text without a place to cut stays whole.

    `exact` says what `cuts_are_exact` found of the tokenizer.
    """
    start = 0
    if exact or len(text) > WHOLE_CHARACTERS:
        while len(text) - start > PIECE_CHARACTERS:
            found = _CUT.search(text, start + PIECE_CHARACTERS)
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
    yield text[start:] if start else text
