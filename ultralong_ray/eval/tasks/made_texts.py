"""Texts that need no files: a made-up essay and made-up questions, the same on every machine.

In go `Words` and a seed; out come a `Haystack` and `QuestionPool`s, in place of Paul Graham's essays, SQuAD and
HotpotQA, whose licences do not allow a copy here. A task on them has RULER's form and another text: its scores are not
comparable with published ones, and `source` says "made up" in every sample.
"""

from __future__ import annotations

import random

from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.ruler_questions import Question, QuestionPool
from ultralong_ray.eval.tasks.words import BUILT_IN, Words

SOURCE = "made up"
SENTENCES = 4000
SENTENCE_FORMS = (
    "The {a} {n} near the {b} {m} would {v} every {o}.",
    "Nobody expected that a {a} {n} could {v} without the {m}.",
    "When the {n} was {a}, people went to {v} by the {b} {m}.",
    "A {n} and a {m} will {v} the {a} {o} before winter.",
)
NUM_PLACES = 400
PLACES_PER_ARTICLE = 8
OTHERS_PER_QUESTION = 8  # beside the two paragraphs that a question over two facts needs, as in HotpotQA
SYLLABLES = ("ba", "cor", "den", "fel", "gar", "hol", "ive", "jun", "kel", "lor", "mar", "nor", "pel", "ros", "tan")


def built_in_words() -> Words:
    """The project's own short lists: unlike `load_words` they do not depend on what is installed."""
    lists = {name: tuple(words.split()) for name, words in BUILT_IN.items()}
    return Words("built in", lists["noun"], lists["adjective"], lists["verb"])


def made_haystack(seed: int = 0) -> Haystack:
    """About 40,000 words of plain sentences; longer budgets repeat them, as RULER repeats its essays."""
    words, rng = built_in_words(), random.Random(f"{seed}/essay")
    sentences = []
    for _ in range(SENTENCES):
        (a, b), (n, m, o) = rng.sample(words.adjectives, 2), rng.sample(words.nouns, 3)
        sentences.append(rng.choice(SENTENCE_FORMS).format(a=a, b=b, n=n, m=m, o=o, v=rng.choice(words.verbs)))
    return Haystack(SOURCE, tuple(" ".join(sentences).split(" ")))


def made_questions(seed: int = 0) -> QuestionPool:
    """One paragraph and one question a place, as in SQuAD; places of an article are related."""
    places = _places(seed)
    paragraphs = [_paragraph(place) for place in places]
    index = {paragraph: number for number, paragraph in enumerate(sorted(paragraphs))}
    own = [index[paragraph] for paragraph in paragraphs]
    questions = []
    for number, (name, _, _, founder, _) in enumerate(places):
        start = number - number % PLACES_PER_ARTICLE
        related = tuple(own[i] for i in range(start, start + PLACES_PER_ARTICLE) if i != number)
        gold = (own[number],)
        questions.append(Question(f"Who founded {name}?", (founder,), gold, related, gold))
    return QuestionPool(SOURCE, tuple(sorted(paragraphs)), tuple(questions))


def made_two_hop_questions(seed: int = 0) -> QuestionPool:
    """The founder of a place stands in one paragraph, the founder's craft in another: HotpotQA's form."""
    places = _places(seed)
    rng = random.Random(f"{seed}/two hops")
    people = [f"{founder}\n{founder} was a {craft} by trade." for _, _, _, founder, craft in places]
    written = [f"{place[0]}\n{_paragraph(place)}" for place in places]
    index = {paragraph: number for number, paragraph in enumerate(sorted([*people, *written]))}
    questions = []
    for number, (name, _, _, _, craft) in enumerate(places):
        needed = (index[written[number]], index[people[number]])
        others = rng.sample([i for i in range(len(places)) if i != number], OTHERS_PER_QUESTION)
        gold = (*needed, *(index[(written if i % 2 else people)[i]] for i in others))
        questions.append(Question(f"What was the trade of the founder of {name}?", (craft,), gold, (), needed))
    return QuestionPool(SOURCE, tuple(sorted(index)), tuple(questions))


def _places(seed: int) -> list[tuple[str, str, int, str, str]]:
    """(place, thing it is known for, year, founder, founder's trade) with distinct places and founders."""
    words, rng = built_in_words(), random.Random(f"{seed}/places")
    names: dict[str, None] = {}
    while len(names) < 2 * NUM_PLACES:
        names["".join(rng.choices(SYLLABLES, k=3)).capitalize()] = None
    drawn = list(names)
    trades = [f"{noun} maker" for noun in words.nouns]
    return [
        (place, rng.choice(words.nouns), rng.randint(1300, 1950), founder, rng.choice(trades))
        for place, founder in zip(drawn[:NUM_PLACES], drawn[NUM_PLACES:], strict=True)
    ]


def _paragraph(place: tuple[str, str, int, str, str]) -> str:
    name, known_for, year, founder, _ = place
    return f"{name} is a town known for its {known_for}. It was founded in {year} by {founder}."
