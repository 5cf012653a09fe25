"""Essay haystacks: one long text as words, with the places where a sentence ends.

In go text files; out come word ranges of any length, the text repeated where it is too short. RULER splits sentences
with nltk's punkt, whose parameters are a download; here a sentence ends at a word that closes with `.`, `!` or `?` and
is no abbreviation or initial. The text itself is the same; a needle may stand a sentence earlier or later.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ultralong_ray.eval.tasks.reading import read_texts
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

_ABBREVIATIONS = (
    "mr mrs ms dr prof sr jr st rev hon gen col capt lt sgt gov sen rep pres messrs mme mlle vs etc inc "
    "ltd co corp bros dept est fig figs vol vols no nos pp ed eds al cf ch viz i.e e.g a.m p.m u.s u.k "
    "a.d b.c jan feb mar apr jun jul aug sep sept oct nov dec"
)
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
_SENTENCE_END = re.compile(r"""^(?P<body>.*?)(?P<mark>[.!?]+)["')\]}]*$""")


@dataclass(frozen=True)
class Haystack:
    """`words` are what single spaces separate. `source` says where the text is from."""

    source: str
    words: tuple[str, ...]

    @cached_property
    def sentence_starts(self) -> list[int]:
        """Word indices at which a sentence starts, 0 first."""
        return [0, *(index + 1 for index, word in enumerate(self.words[:-1]) if ends_sentence(word))]

    def num_sentences(self, num_words: int) -> int:
        """Sentences in the first `num_words` words; a piece of one counts."""
        rounds, rest = divmod(num_words, len(self.words))
        # the last sentence of the text is taken to end with it
        return rounds * len(self.sentence_starts) + bisect.bisect_left(self.sentence_starts, rest)

    def sentence_start(self, sentence: int) -> int:
        """Index of the first word of a sentence of the repeated text."""
        rounds, rest = divmod(sentence, len(self.sentence_starts))
        return rounds * len(self.words) + self.sentence_starts[rest]

    def text(self, start: int, end: int) -> str:
        """Words [start, end) of the repeated text."""
        pieces: list[str] = []
        while start < end:
            offset = start % len(self.words)
            taken = self.words[offset : offset + end - start]
            pieces.extend(taken)
            start += len(taken)
        return " ".join(pieces)


def ends_sentence(word: str) -> bool:
    """Whether a sentence ends with this word."""
    match = _SENTENCE_END.match(word)
    if match is None or match["mark"].endswith(".."):
        return False
    if match["mark"] != ".":
        return True
    body = match["body"].lstrip("\"'([{").lower()
    return not (body in ABBREVIATIONS or (len(body) == 1 and body.isalpha() and body != "i"))


def load_haystack(files: Sequence[Location]) -> Haystack:
    """The texts of the files, one after the other; see `read_texts` for their forms.

    RULER's own haystack is a JSON file of Paul Graham's essays, which its download script makes. Any other text makes
    a task of the same form on other words; `Haystack.source` is kept with every sample for that reason.

    Raises: UserError for an absent file, one without the field, or when there is no word in all of them.
    """
    texts = [text for file in files for text in read_texts(file)]
    words = tuple(re.sub(r"\s+", " ", " ".join(texts)).strip().split(" "))
    if not words[0]:
        raise UserError(f"{', '.join(map(str, files)) or 'haystack'}: no text; name a text file of some length")
    return Haystack(", ".join(file.name for file in files), words)
