"""Retrieval-augmented questions: a short answer from one of many passages, at a depth that is given.

In go a `QuestionPool` (files in the form of SQuAD or HotpotQA); out comes a `Sample`. Form and metric follow the RAG
tasks of HELMET (arXiv 2410.02694; princeton-nlp/HELMET, data.py and utils.py): answer prefix `Answer:`, 20 new tokens,
and substring exact match. HELMET retrieves its passages from Wikipedia for each question; here they are the other
paragraphs of the file, those of the same article first, and solved examples are left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ultralong_ray.eval.tasks.budget import fill
from ultralong_ray.eval.tasks.f1 import normalised
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.ruler_questions import QuestionPool
from ultralong_ray.eval.tasks.sample import Sample

INSTRUCTION = (
    "Use the given documents to write a concise and short answer to the question. "
    "Write your answer in the following format:\nAnswer: [answer]\n\n"
)
QUESTION = "\n\nQuestion: {question}\n"
ANSWER_PREFIX = "Answer:"
MAX_NEW_TOKENS = 20


def retrieved_sample(
    pool: QuestionPool, prompts: Prompts, *, length_tokens: int, depth_percent: float, index: int, seed: int
) -> Sample:
    """Question `index` with passages to fill `length_tokens`, no passage twice; the needed ones stand at the depth.

    `facts["passages"]` tells where the pool was too small for the length.

    Raises: DoesNotFit when the needed passages alone are too long.
    """
    question = pool.questions[index % len(pool.questions)]
    needed = question.needed or question.gold
    rng = random.Random(f"{seed}/retrieved/{length_tokens}/{index}")
    near = [i for i in dict.fromkeys([*question.gold, *question.related]) if i not in needed]
    shown = {*needed, *near}
    far = [i for i in range(len(pool.paragraphs)) if i not in shown]
    others = rng.sample(near, len(near)) + rng.sample(far, len(far))

    def build(num_others: int) -> Sample:
        before = math.floor(num_others * depth_percent / 100 + 0.5)
        # mixed, or the passages of the same article would all come first
        chosen = random.Random(f"{seed}/{index}/{num_others}").sample(others[:num_others], num_others)
        passages = [*chosen[:before], *needed, *chosen[before:]]
        text = "\n\n".join(f"Document: {pool.paragraphs[i]}" for i in passages)
        return Sample(
            task="retrieved/questions",
            index=index,
            context=INSTRUCTION + text,
            question=QUESTION.format(question=question.question),
            answer_prefix=ANSWER_PREFIX,
            references=question.answers,
            max_new_tokens=MAX_NEW_TOKENS,
            metric="substring_exact_match",
            facts={"depth_percent": depth_percent, "passages": len(passages), "questions_from": pool.source},
        )

    return fill(build, prompts, length_tokens, least=0, most=len(others))


def substring_exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when a normalised reference stands in the normalised answer, else 0 (HELMET, utils.py)."""
    given = normalised(prediction)
    return float(any(normalised(reference) in given for reference in references))
