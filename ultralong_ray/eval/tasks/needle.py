"""A needle sentence in a book, at a given depth: the form of Kamradt and of Fu et al., and one with a fresh number.

In go a form, a haystack, a length and a depth; out comes a `Sample`. The prompt and the scoring rule are those of Fu et
al. (arXiv 2402.10171; FranxYao/Long-Context-Data-Engineering @ 2b38d528, eval/needle) but for two things: their
`<|im_start|> `, which is no token of Llama's, is left out, and a perfect answer scores 1, where theirs scores 11/12 for
a word that the expected answer has twice. Their needle is known to every model by now, so the second form asks for a
number that is drawn per sample, as EasyContext does (jzhang38/EasyContext, eval_needle.py). Needles stand between
sentences, and the haystack is cut to whole words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from ultralong_ray.eval.tasks.budget import fill
from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample

Form = Literal["sentence", "number"]

OPENING = "This is a very long story book: <book> "
QUESTION = " </book>.\n Based on the content of the book, Question: {question}\nAnswer:"
SENTENCE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
SENTENCE_QUESTION = "What is the best thing to do in San Francisco?"
SENTENCE_ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."
NUMBER = "The special magic {city} number is: {number}."
CITIES = ("Singapore", "New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")  # the first one is asked for
MAX_NEW_TOKENS = {"sentence": 50, "number": 16}


def needle_sample(
    form: Form,
    haystack: Haystack,
    prompts: Prompts,
    *,
    length_tokens: int,
    depth_percent: float,
    index: int,
    seed: int,
    num_distractors: int = 0,
) -> Sample:
    """A prompt filled to `length_tokens`; depth 0 is before the first sentence, 100 behind the last.

    `num_distractors` (form "number", at most 6) numbers of other cities stand at random sentences.

    Raises: DoesNotFit when the length is too short; ValueError for a number of distractors that no city is left for.
    """
    if num_distractors >= len(CITIES):
        raise ValueError(f"num_distractors {num_distractors} exceeds the {len(CITIES) - 1} other cities")
    rng = random.Random(f"{seed}/{form}/{length_tokens}/{depth_percent:g}/{index}")
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), 1 + num_distractors)]
    shares = [rng.random() for _ in range(num_distractors)]
    if form == "sentence":
        needle, question, answer, prefix = SENTENCE, SENTENCE_QUESTION, SENTENCE_ANSWER, ""
    else:
        needle, answer = NUMBER.format(city=CITIES[0], number=numbers[0]), numbers[0]
        question = f"What is the special magic {CITIES[0]} number?"
        prefix = f" The special magic {CITIES[0]} number is:"
    others = [
        (share, NUMBER.format(city=city, number=number))
        for share, city, number in zip(shares, CITIES[1:], numbers[1:], strict=False)
    ]

    def build(num_words: int) -> Sample:
        sentences = haystack.num_sentences(num_words)
        place = math.floor(sentences * depth_percent / 100 + 0.5)
        inserted = [(place, needle), *((int(share * (sentences + 1)), text) for share, text in others)]
        return Sample(
            task=f"niah/{form}",
            index=index,
            context=OPENING + _with_lines(haystack, num_words, sentences, inserted),
            question=QUESTION.format(question=question),
            answer_prefix=prefix,
            references=(answer,),
            max_new_tokens=MAX_NEW_TOKENS[form],
            metric="word_recall" if form == "sentence" else "first_number",
            facts={"depth_percent": depth_percent, "haystack": haystack.source, "sentences": sentences},
        )

    return fill(build, prompts, length_tokens, least=1)


def _with_lines(haystack: Haystack, num_words: int, sentences: int, inserted: list[tuple[int, str]]) -> str:
    """The first words with every inserted text on a line of its own, before the sentence of its number."""
    pieces: list[str] = []
    start = 0
    for sentence, text in sorted(inserted):
        end = num_words if sentence >= sentences else min(haystack.sentence_start(sentence), num_words)
        pieces += [haystack.text(start, end), f"\n{text}\n"]
        start = end
    return "".join([*pieces, haystack.text(start, num_words)])


def word_recall(prediction: str, references: Sequence[str]) -> float:
    """Share of the distinct words of the expected sentence that are in the answer, case aside (Fu et al.)."""
    given = set(prediction.lower().split())
    return max(len(given & words) / len(words) for words in (set(text.lower().split()) for text in references))
