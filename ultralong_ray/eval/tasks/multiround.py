"""Multi-round retrieval: which of several identical requests in a long conversation got which answer?

In go a haystack text or a file of OpenAI's MRCR; out come `Sample`s whose conversation is in `turns`. The task is that
of OpenAI MRCR (Hugging Face: openai/mrcr, README.md; after Michelangelo, arXiv 2409.12640): a user asks for pieces of
writing; 2, 4 or 8 of the requests are the same; the last message wants one of their answers again, behind a random
string. MRCR's pieces were written by a model; the generated ones here are passages of the haystack.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from ultralong_ray.eval.tasks.budget import fill
from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.reading import read_rows, text_field
from ultralong_ray.eval.tasks.sample import Sample, Turn
from ultralong_ray.eval.tasks.words import Words
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

FORMS = ("poem", "short story", "blog post", "letter", "speech", "riddle", "news article", "diary entry")
NUM_TOPICS = 12
PASSAGE_WORDS = 60
ANSWER_MARGIN_TOKENS = 16
PREFIX_LETTERS = 10
_ORDINALS = {1: "st", 2: "nd", 3: "rd"}


def multiround_sample(
    haystack: Haystack,
    words: Words,
    prompts: Prompts,
    *,
    length_tokens: int,
    num_needles: int,
    index: int,
    seed: int,
) -> Sample:
    """A conversation filled to `length_tokens`; one of `num_needles` equal requests is asked for.

    Raises: DoesNotFit when the length does not hold `num_needles` rounds.
    """
    rng = random.Random(f"{seed}/multiround/{length_tokens}/{num_needles}/{index}")
    topics = rng.sample(words.nouns, min(NUM_TOPICS, len(words.nouns)))
    prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=PREFIX_LETTERS))
    wanted = rng.randrange(num_needles)
    places = [rng.random() for _ in range(num_needles)]  # share of the other rounds that come before
    request, *others = rng.sample(
        [f"{form} about {topic}" for form in FORMS for topic in topics], len(FORMS) * len(topics)
    )
    sentences = len(haystack.sentence_starts)
    draws = rng.getrandbits(64)

    def build(num_others: int) -> Sample:
        own = random.Random(draws)  # starts over: more rounds leave the earlier ones as they are
        passages = _passages(haystack, own, sentences)
        needles = [next(passages) for _ in range(num_needles)]
        rounds = [(others[own.randrange(len(others))], next(passages)) for _ in range(num_others)]
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            rounds.insert(int(place * (num_others + 1)), (request, needle))
        answers = [passage for asked, passage in rounds if asked == request]
        return Sample(
            task=f"multiround/{num_needles}",
            index=index,
            context="",
            question=final_request(prefix, wanted + 1, request),
            answer_prefix="",
            references=(prefix + answers[wanted],),
            max_new_tokens=answer_tokens,
            metric="sequence_ratio",
            turns=tuple(turn for asked, passage in rounds for turn in _round(asked, passage)),
            facts={"prefix": prefix, "wanted": wanted + 1, "rounds": len(rounds), "haystack": haystack.source},
        )

    answer_tokens = 0
    shortest = build(0)
    answer_tokens = max(prompts.estimate(turn.content) for turn in shortest.turns) + ANSWER_MARGIN_TOKENS
    return fill(build, prompts, length_tokens, least=0)


def final_request(prefix: str, number: int, request: str) -> str:
    """The last message, in MRCR's words; `number` counts from 1."""
    ending = "th" if 10 <= number % 100 <= 20 else _ORDINALS.get(number % 10, "th")
    asked = f"{number}{ending} (1 indexed) {request}"
    return f"Prepend {prefix} to the {asked}. Do not include any other text in your response."


def _round(request: str, passage: str) -> tuple[Turn, Turn]:
    article = "an" if request[0] in "aeiou" else "a"
    return Turn("user", f"Write {article} {request}"), Turn("assistant", passage)


def _passages(haystack: Haystack, rng: random.Random, sentences: int) -> Any:
    """Endless distinct passages of `PASSAGE_WORDS` words; each starts with a sentence, as long as there are enough."""
    seen: set[str] = set()
    repeats = 0
    while True:
        start = haystack.sentence_start(rng.randrange(sentences)) + repeats
        passage = haystack.text(start, start + PASSAGE_WORDS)
        if passage not in seen:
            seen.add(passage)
            yield passage
        elif len(seen) > sentences // 2:
            repeats += 1  # most sentences were used: passages start one word later
            if repeats > len(haystack.words):
                raise UserError(
                    f"multiround: {haystack.source} has only {len(seen)} different passages of {PASSAGE_WORDS} words; "
                    f"name a longer haystack text"
                )


def mrcr_samples(file: Location, prompts: Prompts, *, length_tokens: int, limit: int | None = None) -> list[Sample]:
    """Rows of OpenAI's MRCR as JSON lines whose conversation and answer fit; longer ones are left out.

    Fields: prompt (messages, or their JSON), answer, random_string_to_prepend.

    Raises: UserError for an absent file, a bad line, or when no row fits.
    """
    rows = read_rows(file, ("prompt", "answer", "random_string_to_prepend"))
    samples = []
    for index, row in enumerate(rows):
        sample = prompts.measured(_mrcr_sample(index, row, f"{file}: row {index + 1}", prompts))
        if sample.prompt_tokens + sample.max_new_tokens <= length_tokens and (limit is None or len(samples) < limit):
            samples.append(sample)
    if not samples:
        raise UserError(f"{file}: no row fits into {length_tokens} tokens; ask for a longer context")
    return samples


def _mrcr_sample(index: int, row: dict[str, Any], where: str, prompts: Prompts) -> Sample:
    messages = row["prompt"]
    try:
        messages = json.loads(messages) if isinstance(messages, str) else messages
        turns = tuple(Turn(message["role"], message["content"]) for message in messages)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: field 'prompt' is no list of messages with role and content ({error!r})") from error
    if not turns or turns[-1].role != "user":
        raise UserError(f"{where}: the last message of 'prompt' must be the user's; mend the line")
    answer = text_field(row, "answer", where)
    return Sample(
        task="multiround/mrcr",
        index=index,
        context="",
        question=turns[-1].content,
        answer_prefix="",
        references=(answer,),
        max_new_tokens=prompts.estimate(answer) + ANSWER_MARGIN_TOKENS,
        metric="sequence_ratio",
        turns=turns[:-1],
        facts={"prefix": text_field(row, "random_string_to_prepend", where), "needles": row.get("n_needles")},
    )


def sequence_ratio(prediction: str, references: Sequence[str], prefix: str) -> float:
    """Similarity of answer and reference behind the random string (difflib's ratio); 0 where it does not come first."""
    if not prediction.startswith(prefix):
        return 0.0
    reference = references[0].removeprefix(prefix)
    return float(SequenceMatcher(None, prediction.removeprefix(prefix), reference).ratio())
