"""RULER's variable tracking: a chain of assignments among noise lines; which variables hold the value?

In go a number of noise lines and the two random generators that RULER draws from; out comes a `Draft`. Follows
NVIDIA/RULER @ c3f5e3b4, scripts/data/synthetic/variable_tracking.py (noise haystack), draw by draw.
"""

from __future__ import annotations

import itertools
import random
import string

import numpy as np

from ultralong_ray.eval.tasks.ruler_needles import NOISE, Draft

INSTRUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
    "the value {value}, they are: "
)
NUM_HOPS = 4
DEMONSTRATION_TOKENS = 500  # of the one solved example, as in RULER


def tracking_draft(
    noise_lines: int,
    rng: random.Random,
    numpy_rng: np.random.RandomState,
    *,
    num_chains: int = 1,
    num_hops: int = NUM_HOPS,
    name_letters: int = 5,
) -> Draft:
    """A problem with `num_chains` chains; the first one is asked for. `noise_lines` > `num_hops`."""
    chains = _chains(rng, numpy_rng, num_chains, num_hops, name_letters)
    lines = [NOISE] * noise_lines
    for _, assignments in chains:
        places = sorted(rng.sample(range(len(lines)), len(assignments)))
        for shift, (place, line) in enumerate(zip(places, assignments, strict=True)):
            lines.insert(place + shift, line)
    names, assignments = chains[0]
    value = assignments[0].split("=")[-1].strip()
    return Draft(
        INSTRUCTION + "\n".join(lines),
        QUESTION.format(value=value),
        ANSWER_PREFIX.format(number=num_hops + 1, value=value),
        tuple(names),
        {"value": value},
    )


def _chains(
    rng: random.Random, numpy_rng: np.random.RandomState, num_chains: int, num_hops: int, letters: int
) -> list[tuple[list[str], list[str]]]:
    """(names, assignment lines) per chain; every name is used once."""
    per_chain = num_hops + 1
    names: dict[str, None] = {}  # a set in the order of drawing
    while len(names) < per_chain * num_chains:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    chains = []
    for start in range(0, per_chain * num_chains, per_chain):
        own = list(names)[start : start + per_chain]
        lines = [f"VAR {own[0]} = {numpy_rng.randint(10000, 99999)}"]
        lines += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(own)]
        chains.append((own, lines))
    return chains


def solved(draft: Draft) -> str:
    """A problem with its answer behind it, as it stands before the problem that is asked."""
    return f"{draft.context}{draft.question}{draft.answer_prefix} {' '.join(draft.answers)}\n\n"
