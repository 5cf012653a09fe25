"""Essay haystacks: one long text as words, with the places where a sentence ends.

In go text files; out come word ranges of any length, the text repeated where it is too short. RULER splits sentences
with nltk's punkt, whose parameters are a download of 20,000 words and how they are written; here a short list of
abbreviations and one of words that open sentences stand for them. On Emerson's essays they agree everywhere, on Paul
Graham's but for two sentences of a thousand, where a needle may stand a sentence earlier or later.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ultralong_ray.eval.tasks.reading import read_texts
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

# Only what punkt takes for one, from newspapers: etc., e.g., no. and capt. are no abbreviations to it.
_ABBREVIATIONS = (
    "mr mrs ms dr prof sr jr st gen col lt maj sen rep reps messrs vs inc ltd co cos corp bros ave adm ph.d "
    "a.m p.m u.s u.k u.n u.s.a a.d d.c n.y n.j jan feb aug sep sept oct nov dec ala ariz calif colo conn fla ga ill "
    "kan ky mich minn nev okla ore pa tenn va vt wash wis w.va ok ft yr"
)
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
LETTERS = frozenset("cdefhklmnprstvw")  # never the end of a sentence; the other ones before a word that opens one
_OPENERS = (
    "although both but does even he her here however i if in indeed instead it many most nothing since so some "
    "sometimes soon still such the there these they this though thus through under very when which while without "
    "yes yet your"
)
OPENERS = frozenset(_OPENERS.split())  # capitalised behind an abbreviation, they begin a sentence
_MORE_OPENERS = "a an and as at for from my no not of on one or our she that then to we what you"
MORE_OPENERS = OPENERS | frozenset(_MORE_OPENERS.split())  # behind a single letter
_SENTENCE_END = re.compile(r"""^(?P<body>.*?)(?P<mark>[.!?]+)(?P<closed>["')\]}]*)$""")
# The last mark of a word that another sign follows: a sentence may end within, as in `end.[2]` and `end.)Then`.
_INNER_END = re.compile(r"""(?P<head>.*[.!?](?:["')\]}]+(?=--)|(?!-)))(?P<tail>["'()\[\]{};:*@-].*)""")


@dataclass(frozen=True)
class Haystack:
    """`words` are what single spaces separate. `source` says where the text is from."""

    source: str
    words: tuple[str, ...]

    @cached_property
    def sentence_starts(self) -> list[int]:
        """Word indices at which a sentence starts, 0 first."""
        following = enumerate(itertools.pairwise(self.words), start=1)
        return [0, *(index for index, (word, then) in following if ends_sentence(word, then))]

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


def ends_sentence(word: str, following: str = "") -> bool:
    """Whether one sentence ends with this word, and `following` begins the next."""
    match = _SENTENCE_END.match(word)
    if match is None:
        return False
    body, mark = match["body"].lstrip("\"'([{").lower(), match["mark"]
    after = match["closed"] or following  # a bracket or quotation mark is a word of its own to punkt
    opener = after.rstrip(".,;:!?").split("'")[0].lower() if after[:1].isupper() else ""
    if mark.endswith("..") or (mark == "." and body in ABBREVIATIONS):
        return opener in OPENERS
    if mark == "." and len(body) == 1 and body.isalpha():
        return body not in LETTERS and (opener in MORE_OPENERS or not after[:1].isalpha())
    return True


def _pieces(word: str) -> list[str]:
    """A word, or the two of one that a sentence ends within: RULER joins sentences with a space."""
    match = _INNER_END.fullmatch(word)
    if match is None or _SENTENCE_END.match(match["tail"]) or not match["tail"].strip("\"')]}"):
        return [word]
    return [match["head"], match["tail"]] if ends_sentence(match["head"], match["tail"]) else [word]


def load_haystack(files: Sequence[Location]) -> Haystack:
    """The texts of the files, one after the other; see `read_texts` for their forms.

    RULER's own haystack is a JSON file of Paul Graham's essays, which its download script makes. Any other text makes
    a task of the same form on other words; `Haystack.source` is kept with every sample for that reason.

    Raises: UserError for an absent file, one without the field, or when there is no word in all of them.
    """
    texts = [text for file in files for text in read_texts(file)]
    words = tuple(piece for word in " ".join(texts).split() for piece in _pieces(word))
    if not words:
        raise UserError(f"{', '.join(map(str, files)) or 'haystack'}: no text; name a text file of some length")
    return Haystack(", ".join(file.name for file in files), words)
