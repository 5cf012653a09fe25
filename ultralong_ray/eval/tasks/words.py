"""Word lists for needles and for the common-words task.

RULER takes its words from the package wonderwords 2.2.0 (6,786 nouns, 912 adjectives, 1,042 verbs) and, for long
lists, from an English dictionary. Version 3 of the package has other lists, so the version is checked. In go the
installed package, or files of the same shape; out comes `Words`.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import importlib.resources
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ultralong_ray.eval.tasks.reading import read_json, read_text
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

WONDERWORDS_VERSION = "2.2.0"
BUILT_IN = {
    "adjective": (
        "able amber ample ancient bitter blue brave brief bright broad calm clean clear clever cold cool "
        "crisp curious damp dark deep dense dim distant dry dusty early easy equal exact faint fair famous "
        "fast fine firm flat fond frank free fresh full gentle glad gold grand green grey happy hard heavy "
        "hollow honest huge humble idle keen kind large late lean light little lively local long loose loud "
        "low loyal mild modern narrow neat new noble odd old open pale patient plain polite proud pure quick "
        "quiet rare ready red rich ripe rough round royal rural safe sharp shy silent simple slim slow small "
        "smart smooth soft solid sour spare steady steep still strange strict strong sturdy sweet swift tall "
        "tame tender thick thin tidy tiny true vast vivid warm wide wild wise"
    ),
    "noun": (
        "acorn anchor apple arrow badge barn basin basket beach beam bell bench bird blanket boat book "
        "bottle bowl bread brick bridge brush bucket cabin candle canyon carpet castle cave chain chair "
        "chalk cheese cliff clock cloud coat coin copper corner cotton cradle creek crown cup curtain desert "
        "desk diary dish door drum eagle engine fabric falcon farm feather fence field flag flute forest "
        "fork fountain garden gate glass glove goat hammer harbor hill honey horn island jacket jar kettle "
        "key kite ladder lake lamp lantern leaf ledger lemon letter lily lock maple map marble market meadow "
        "mill mirror moon mountain needle nest oak ocean orchard oven owl paddle paper parcel path pebble "
        "pencil piano pillow pine plate pocket pond potato prairie pump quilt rabbit raft rail river road "
        "robin roof rope rose saddle sail salt sand scarf shelf shell shovel silver sled spoon spring "
        "squirrel stable star stone stove straw street table tent thread tiger tower train tunnel valley "
        "vase village violin wagon wall wheel whistle willow window wolf wood wool yard"
    ),
    "verb": (
        "add agree answer arrive ask bake begin bend blow borrow bounce breathe bring build burn bury buy "
        "call carry carve catch choose climb collect cook count cover cross dance decide deliver dig divide "
        "draw drift drink drive earn eat explain fall feed fetch find float fold follow gather give grow "
        "guess hang hear help hide hold hunt invite join jump keep kick kneel knock laugh lead learn leave "
        "lend listen look mend mix move obey offer paint pass pause plant play pour praise press promise "
        "pull push reach read repair reply rest ride ring run sail save search see sell send sew shake share "
        "shine shout show sing sit sleep slide smile speak spend spin stand start stay stir swim take talk "
        "taste teach tell think throw tie touch trade travel trust turn visit wait wake walk wander wash "
        "watch weave whisper win wonder work wrap write"
    ),
}


class HyphenPairs(Sequence[str]):
    """The sorted set of all `adjective-noun`, made as asked for: RULER's list of 6 million takes a gigabyte."""

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        # An adjective that another one continues with a hyphen ("ill", "ill-fated") is sorted in among its pairs, so
        # such families are written out; every other adjective is a family of its own.
        families: list[list[str]] = []
        for adjective in sorted(set(adjectives), key=lambda word: word + "-"):
            if families and adjective.startswith(families[-1][0] + "-"):
                families[-1].append(adjective)
            else:
                families.append([adjective])
        self._families = [(f[0], self._pairs(f) if len(f) > 1 else None) for f in families]
        self._ends: list[int] = []
        for _, pairs in self._families:
            size = len(self._nouns) if pairs is None else len(pairs)
            self._ends.append(size + (self._ends[-1] if self._ends else 0))

    def _pairs(self, family: list[str]) -> list[str]:
        return sorted({f"{adjective}-{noun}" for adjective in family for noun in self._nouns})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        family = bisect.bisect_right(self._ends, index)
        adjective, pairs = self._families[family]
        offset = index - (self._ends[family - 1] if family else 0)
        return f"{adjective}-{self._nouns[offset]}" if pairs is None else pairs[offset]


@dataclass(frozen=True)
class Words:
    """`source` says where the words are from; `dictionary` is the long list, empty where there is none."""

    source: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    dictionary: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> HyphenPairs:
        return HyphenPairs(self.adjectives, self.nouns)

    def common_pool(self, shuffle_seed: int) -> list[str]:
        """All distinct words in the order of the common-words task (RULER, common_words_extraction.py)."""
        pool = sorted({*self.nouns, *self.adjectives, *self.verbs})
        random.Random(shuffle_seed).shuffle(pool)
        return pool

    def most_distinct(self, pool: Sequence[str]) -> int:
        """How many words `distinct` can draw."""
        return max(len(pool), len(self.dictionary) if self.dictionary else len(pool) + len(self.keys))

    def distinct(self, count: int, rng: random.Random, pool: Sequence[str]) -> list[str]:
        """`count` words of `pool` (see `common_pool`), or all from the dictionary when the pool has fewer, as RULER.

        Without a dictionary the rest are adjective-noun pairs.
        """
        if count <= len(pool):
            return rng.sample(pool, count)
        if self.dictionary:
            return rng.sample(self.dictionary, count)
        return rng.sample(pool, len(pool)) + rng.sample(self.keys, count - len(pool))


def load_words(lists: Location | str | None = None, dictionary: Location | None = None) -> Words:
    """Words from a JSON file {"noun": [...], "adjective": [...], "verb": [...]}, else wonderwords, else built in.

    `lists` may name "wonderwords" or "built in", and nothing else is taken then. `dictionary` has one word a line, or
    is NVIDIA's english_words.json ({"0": "a", ...}).

    Raises: UserError for a file of another shape, for another version of wonderwords, and where it is named and absent.
    """
    long_list = _dictionary_words(dictionary) if dictionary is not None else ()
    if not isinstance(lists, Location):
        source, found = _named_words(lists)
    else:
        source, found = lists.name, read_json(lists)
        for name in BUILT_IN:
            listed = found.get(name) if isinstance(found, dict) else None
            if not isinstance(listed, list) or not listed or not all(isinstance(word, str) for word in listed):
                raise UserError(
                    f"{lists}: field {name!r} must be a list of words; see wonderwords {WONDERWORDS_VERSION}"
                )
    return Words(source, tuple(found["noun"]), tuple(found["adjective"]), tuple(found["verb"]), long_list)


def _dictionary_words(file: Location) -> tuple[str, ...]:
    if not file.name.removesuffix(".gz").endswith(".json"):
        return tuple(read_text(file).split())
    found = read_json(file)
    words = tuple(found.values()) if isinstance(found, dict) else ()
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(f'{file}: a JSON dictionary must be of the form {{"0": "word", ...}}; or give one word a line')
    return words


def _named_words(name: str | None) -> tuple[str, dict[str, list[str]]]:
    """The lists of the installed wonderwords; built in, without it: about 500 words of our own, which RULER's are not.

    `name`: the one of both that is wanted.
    """
    built_in = "built in", {kind: words.split() for kind, words in BUILT_IN.items()}
    if name == "built in":
        return built_in
    try:
        version = importlib.metadata.version("wonderwords")
    except importlib.metadata.PackageNotFoundError:
        if name is None:
            return built_in
        raise UserError(
            f"evaluate.tasks, words = {name!r}: the package is not installed; run "
            f"`pip install wonderwords=={WONDERWORDS_VERSION}`, or name a file, or 'built in'"
        ) from None
    if version != WONDERWORDS_VERSION:
        raise UserError(
            f"wonderwords {version} has other words than RULER's; run `pip install wonderwords=={WONDERWORDS_VERSION}`"
        )
    assets = importlib.resources.files("wonderwords") / "assets"
    lists = {name: (assets / f"{name}list.txt").read_text(encoding="utf-8").splitlines() for name in BUILT_IN}
    # some lines end with a space, which the package strips
    return f"wonderwords {version}", {name: [word.rstrip() for word in words] for name, words in lists.items()}
