"""Wordings of synthetic tasks for a base model trained from nothing: one function per kind, all pure.

Flows in: a random generator and a length in units of about a dozen tokens. Flows out: a context, a question and an
answer, the last in segments with the weight of their tokens as targets. A segment of weight 0 is a further question
about the same context, whose answer is what follows.

The kinds ask for what RULER asks for (arXiv 2404.06654: needles, variable tracking, common and frequent words,
questions about documents), and for copying and arithmetic. Names, words and numbers are drawn anew for every document,
wordings are put together from alternatives, and no alternative is the sentence of a benchmark as a whole.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial

from ultralong_ray.data.task_text import NOISE, digits, drawn_words, natural, scattered, text_words

ANSWER_WEIGHT = 8
ROUNDS = ("rounds", "rounds_from_start")
MOST_ROUNDS, UNITS_PER_ROUND = 256, 40  # questions about one context: one for about 500 tokens

Segments = list[tuple[str, int]]  # (text, weight of its tokens as targets)
Task = tuple[str, str, Segments]  # context, question, answer
Body = Callable[[random.Random, int], Task]

QUALITIES = ["secret", "lucky", "hidden", "special", "magic", "golden", "private", "ancient", "silver", "odd", "famous"]
NOUNS = {
    "number": ("number", "code", "price", "count"),
    "uuid": ("uuid", "id", "token", "key"),
    "word": ("word", "name", "password", "colour"),
}
THINGS = [f"{quality} {noun}" for quality in QUALITIES for noun in ("number", "code", "key", "word", "price", "date")]
TRADES = ["baker", "teacher", "pilot", "doctor", "painter", "farmer", "lawyer", "singer", "sailor", "writer", "builder"]


def needles(rng: random.Random, units: int) -> Task:
    """Values of keys, hidden in noise, in text or among others of their like; one or more of them are asked for."""
    value_kind = rng.choices(("number", "uuid", "word"), (5, 2, 3))[0]
    noun, quality = rng.choice(NOUNS[value_kind]), " ".join(rng.sample(QUALITIES, rng.randint(1, 2)))
    quality = "magic special" if quality == "special magic" else quality
    key_kind = rng.choices(("word", "pair", "uuid"), (4, 5, 1))[0]
    haystack = rng.choices(("noise", "text", "needles"), (3, 4, 3))[0]
    asked, values_each = rng.choices(((1, 1), (1, rng.randint(2, 4)), (rng.randint(2, 4), 1)), (6, 2, 2))[0]
    line = rng.choice(
        (
            f"One of the {quality} {noun}s for {{}} is: {{}}.",
            f"The {quality} {noun} for {{}} is: {{}}.",
            f"Remember that {{}} has the {quality} {noun} {{}}.",
        )
    )
    least = asked * values_each
    others = rng.randint(0, 4)
    if haystack == "needles":
        per_line = 2 + 3 * (value_kind == "uuid") + 3 * (key_kind == "uuid")
        others = max(1, units // per_line - least)
    keys = _keys(rng, key_kind, asked + others)
    facts = [(key, _value(rng, value_kind)) for key in keys[:asked] for _ in range(values_each)]
    placed = facts + [(key, _value(rng, value_kind)) for key in keys[asked:]]
    rng.shuffle(placed)
    lines = [line.format(key, value) for key, value in placed]
    if haystack != "needles":
        room = max(1, units - 2 * len(lines))
        lines = scattered(rng, lines, [NOISE] * max(1, room // 2) if haystack == "noise" else natural(rng, room))
    one = least == 1
    names = _joined(keys[:asked])
    values = [value for key in keys[:asked] for k, value in placed if k == key]
    plural = noun if one else f"{noun}s"
    verb = "is" if one else "are"
    question = rng.choice(
        (
            f"What {verb} {'' if one else 'all '}the {quality} {plural} for {names} mentioned in the provided text?",
            f"Which {quality} {plural} does the text give for {names}?",
            f"Name {'the' if one else 'every'} {quality} {noun} of {names} that stands in the text.",
        )
    )
    prefix = rng.choice(
        (
            f"The {quality} {plural} for {names} mentioned in the provided text {verb}",
            f"The {quality} {plural} for {names} {verb}",
            f"The text says that the {plural} {verb}",
        )
    )
    intro = rng.choice(
        (
            f"Some {quality} {noun}s are hidden within the following text. I will ask about the {noun}s afterwards.",
            f"Make sure to memorize every {quality} {noun} of this text.",
            f"Read the text and keep the {quality} {noun}s in mind.",
        )
    )
    joint = "\n" if haystack != "text" or rng.random() < 0.3 else " "
    return f"{intro}\n{joint.join(lines)}", question, [(prefix, 1), (f" {_joined(values)}", ANSWER_WEIGHT), (".", 1)]


def rounds(rng: random.Random, units: int, *, from_start: bool = False) -> Task:
    """Many facts hidden in noise or text, asked for one after another: one reading of a long context, many answers.

    Of four facts one has no key ("The pass key is 12345."), as there is but one of its kind in the text. Chance puts
    hardly any where the text begins, farthest from its question. With `from_start` every second fact goes where the
    logarithm of its distance from the beginning is uniform, so as many to lines 10 to 100 as to lines 1,000 to 10,000.
    """
    asked = max(2, min(MOST_ROUNDS, units // UNITS_PER_ROUND))
    noisy, noun = rng.random() < 0.5, rng.choice(("code", "number", "password", "price", "value"))
    things = ["pass key", *rng.sample(THINGS, k=min(len(THINGS), asked // 4))][: max(1, asked // 4)]
    keys = _keys(rng, rng.choice(("word", "pair")), asked - len(things))
    names = [*things, *(f"{noun} of {key}" for key in keys)]
    rng.shuffle(names)
    values = {name: digits(rng, 4, 7) for name in names}
    line = rng.choice(
        ("The {0} is {1}. Remember it. {1} is the {0}.", "The {0} is {1}. Remember it.", "The {0} is {1}.")
    )
    room = max(1, units - 5 * asked)  # two units a line, three a question with its answer
    filler = [NOISE] * max(1, room // 2) if noisy else natural(rng, room)
    lines = [line.format(*fact) for fact in values.items()]
    early = asked // 2 if from_start else 0
    text = scattered(rng, lines[early:], filler)
    for fact in lines[:early]:
        text.insert(int(len(text) ** rng.random()) - 1, fact)
    intro = rng.choice(("Some facts are hidden in this text. I will ask for them.", "Read this text with care."))
    ask = rng.choice(("What is the {}?", "Which is the {}?", "What does the text say is the {}?"))
    rng.shuffle(names)
    answers: Segments = []
    for name in names:
        further = [(ask.format(name), 0)] if answers else []
        answers += [*further, (f"The {name} is", 1), (f" {values[name]}", ANSWER_WEIGHT), (".", 1)]
    return f"{intro}\n{' '.join(text)}", ask.format(names[0]), answers


def _keys(rng: random.Random, kind: str, count: int) -> list[str]:
    if kind == "uuid":
        return [_uuid(rng) for _ in range(count)]
    words = drawn_words(rng, count)
    if kind == "word":
        return words
    return [f"{rng.choice(QUALITIES + text_words())}-{word}" for word in words]


def _value(rng: random.Random, kind: str) -> str:
    if kind == "uuid":
        return _uuid(rng)
    return digits(rng, 4, 8) if kind == "number" else drawn_words(rng, 1)[0]


def _uuid(rng: random.Random) -> str:
    text = f"{rng.getrandbits(128):032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def variables(rng: random.Random, units: int) -> Task:
    """Chains of assignments among noise: which variables have this value?"""
    form = rng.choice((("VAR {} = {}", "VAR {} = VAR {} "), ("{} = {}", "{} = {}"), ("let {} be {}.", "let {} be {}.")))
    letters, hops = rng.randint(3, 5), rng.randint(1, 4)
    chains = 1 if rng.random() < 0.6 else rng.randint(2, 3)
    parts = []
    if units > 40 and rng.random() < 0.4:  # a solved example first, as benchmarks have it
        context, question, answer = _tracking(rng, 16, form, 3, hops, 1)
        parts = [context, question + " " + "".join(text for text, _ in answer), ""]
    context, question, answer = _tracking(rng, units - 30 * bool(parts), form, letters, hops, chains)
    return "\n".join([*parts, context]), question, answer


def _tracking(rng: random.Random, units: int, form: tuple[str, str], letters: int, hops: int, chains: int) -> Task:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters)) for _ in range(chains * (hops + 1))]
    values = [digits(rng, 4, 5) for _ in range(chains)]
    lines: list[str] = []
    for chain, value in enumerate(values):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        steps = [form[0].format(own[0], value), *(form[1].format(b, a) for a, b in itertools.pairwise(own))]
        lines = scattered(rng, steps, lines)
    room = max(1, units - len(lines))
    lines = scattered(rng, lines, [NOISE] * max(1, room // 2) if rng.random() < 0.7 else natural(rng, room))
    chain = rng.randrange(chains)
    own, value = names[chain * (hops + 1) : (chain + 1) * (hops + 1)], values[chain]
    intro = rng.choice(("Memorize the chains of assignments hidden in this text.", "Track who is assigned what."))
    question = rng.choice(
        (
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            f"Which variables have the value {value}?",
        )
    )
    prefix = rng.choice(
        (
            f"According to the assignments above, {len(own)} variables are assigned the value {value}, they are: ",
            f"The variables with the value {value} are: ",
        )
    )
    return "\n".join([intro, "", *lines]), question, [(prefix, 1), (" ".join(own), ANSWER_WEIGHT)]


def common_words(rng: random.Random, units: int) -> Task:
    """A numbered list in which some words come more often than the rest."""
    entries = max(6, 2 * units)
    rare = rng.randint(1, 3)
    often = rare * rng.randint(3, 10)
    common = max(1, min(rng.choice((1, 3, 5, 10)), entries // (2 * often)))
    others = max(2, (entries - common * often) // rare)
    words = drawn_words(rng, common + others)
    listed = words[:common] * often + words[common:] * rare
    rng.shuffle(listed)
    answer = sorted(words[:common], key=listed.index)  # in the order of the list, so that there is one right answer
    number = "word" if common == 1 else f"{common} words"
    intro = rng.choice(("Below is a list of words. Some of them appear more often than others.", "Count these words."))
    question = rng.choice(
        (f"Question: What are the {common} most common words in the list?", f"Which {number} did appear most often?")
    )
    prefix = rng.choice(("Answer: The words that appear most often in the list are:", "The most common ones are:"))
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return f"{intro}\n{text}", question, [(prefix, 1), (_numbered(answer), ANSWER_WEIGHT)]


def _numbered(words: list[str]) -> str:
    return "".join(f" {i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(rng: random.Random, units: int) -> Task:
    """Coded words drawn by Zipf's law: the three most frequent ones."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    total, alpha = max(12, 3 * units), rng.uniform(1.6, 2.4)
    coded = ["".join(rng.choices(letters, k=rng.randint(5, 7))) for _ in range(max(6, units // 3))]
    shares = [rank**-alpha for rank in range(1, len(coded) + 1)]
    counts = [max(1, int(total * share / sum(shares))) for share in shares]
    counts[:4] = [max(count, 5 - rank) for rank, count in enumerate(counts[:4])]
    first = 1 if rng.random() < 0.6 else 0  # the most frequent one may be dots
    text = [
        ("..." if first and i == 0 else word)
        for i, (word, n) in enumerate(zip(coded, counts, strict=True))
        for _ in range(n)
    ]
    rng.shuffle(text)
    intro = rng.choice(("Read this coded text and count each coded word.", "The following text is in code."))
    question = rng.choice(
        (
            "Question: What are the three most frequently appeared words in the coded text?",
            "Which three coded words come most often? Ignore the dots.",
        )
    )
    prefix = rng.choice(("Answer: The three most frequent words of the coded text are:", "They are:"))
    answer = " " + " ".join(coded[first : first + 3])
    return f"{intro} {' '.join(text)}", question, [(prefix, 1), (answer, ANSWER_WEIGHT), (".", 1)]


def questions(rng: random.Random, units: int) -> Task:
    """Documents about people who do not exist, one of whom is asked about; or the rest of a sentence of a text."""
    if rng.random() < 0.25:
        return _continued(rng, units)
    count = max(2, units // 6)
    people = [
        f"{a.capitalize()} {b.capitalize()}" for a, b in zip(*(drawn_words(rng, count) for _ in "ab"), strict=True)
    ]
    places = [word.capitalize() for word in drawn_words(rng, count)]
    trades, years = rng.choices(TRADES, k=count), [str(rng.randint(1500, 1999)) for _ in range(count)]
    documents = []
    for i, person in enumerate(people):
        lines = [
            f"{person} was born in {places[i]} in {years[i]}.",
            f"{person} worked as a {trades[i]} for many years.",
            f"{person} was taught by {people[i - 1]}.",
        ]
        rng.shuffle(lines)
        documents.append(f"Document {i + 1}:\n{' '.join(lines + natural(rng, 3))}")
    order = list(range(count))
    rng.shuffle(order)
    i = rng.choice(order)
    question, answer = rng.choice(
        (
            (f"Where was {people[i]} born?", places[i]),
            (f"In which year was {people[i]} born?", years[i]),
            (f"What did {people[i]} work as?", trades[i]),
            (f"Who taught {people[i]}?", people[i - 1]),
            (f"Where was the person who taught {people[i]} born?", places[i - 1]),
            (f"Who was born in {places[i]}?", people[i]),
        )
    )
    intro = rng.choice(("Answer the question from the documents, in a few words.", "The following are documents."))
    context = "\n\n".join([intro, *(documents[k] for k in order), ""])
    return context, f"Question: {question}", [("Answer:", 1), (f" {answer}", ANSWER_WEIGHT)]


def _continued(rng: random.Random, units: int) -> Task:
    lines = natural(rng, units)
    words = rng.choice(lines).split()
    cut = rng.randint(1, max(1, len(words) - 1))
    start, rest = " ".join(words[:cut]), " ".join(words[cut:])
    question = f'How does the sentence go on that begins with "{start}"?'
    return " ".join(lines), question, [("It goes on:", 1), (f" {rest}", ANSWER_WEIGHT)]


def copying(rng: random.Random, units: int) -> Task:
    """A text to be repeated word by word."""
    half = max(1, units // 2)
    made = rng.random() < 0.5
    text = " ".join(drawn_words(rng, 4 * half)) if made else " ".join(natural(rng, half))
    intro = rng.choice(("Repeat this text:", "Copy the following words:", "Say the same again:"))
    return f"{intro}\n{text}", rng.choice(("Now repeat it.", "Write it again.")), [(text, 2)]


def arithmetic(rng: random.Random, units: int) -> Task:
    """Sums, differences and small products; where there is room, many."""
    asked, answer = _sum(rng)
    segments: Segments = [(f"{asked} =", 1), (f" {answer}", ANSWER_WEIGHT)]
    for _ in range(0 if rng.random() < 0.5 else max(0, units - 2)):
        more, result = _sum(rng)
        segments += [(f"\n{more} =", 1), (f" {result}", ANSWER_WEIGHT)]
    return "Work it out.", f"What is {asked}?", segments


def _sum(rng: random.Random) -> tuple[str, int]:
    a, b = rng.randrange(10 ** rng.randint(1, 3)), rng.randrange(10 ** rng.randint(1, 2))
    sign = rng.choice("+-*")
    if sign == "*":
        a, b = a % 13, b % 13
    if sign == "-" and b > a:
        a, b = b, a
    return f"{a} {sign} {b}", {"+": a + b, "-": a - b, "*": a * b}[sign]


BODIES: dict[str, Body] = {
    "needles": needles,
    "rounds": rounds,
    "rounds_from_start": partial(rounds, from_start=True),
    "variables": variables,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "questions": questions,
    "copying": copying,
    "arithmetic": arithmetic,
}
