"""Steps whose numbers say that a run should not simply go on: not finite, no targets, a loss that stands out.

Flows in: numbers of a step, and where its checkpoints are. Flows out: words, or a UserError that names the step, its
sequences and the last checkpoint from before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NoReturn

from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import committed, step_of
from ultralong_ray.types import UserError

SPIKE_STEPS = 20  # a loss is compared with the median of so many before it
SPIKE_FIRST_STEPS = 5  # and with none where there are fewer than these


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite. Alerts know it by this name."""


def refuse_broken(
    step: int, sums: list[list[float]], grad_norm: float, sequences: list[int], checkpoints: Location, section: str
) -> None:
    """Raise UserError when a step had no targets, NotFinite for a loss or gradient that is. `sums`: StepResult's;
    `section`: the recipe's.
    """
    if sum(row[1] for row in sums) == 0:
        raise UserError(f"step {step}: no token of sequences {sequences} is a target (all loss weights are 0)")
    ranks = [rank for rank, row in enumerate(sums) if not math.isfinite(row[0])]
    if ranks or not math.isfinite(grad_norm):
        what = f"loss on ranks {ranks}" if ranks else f"gradient norm ({grad_norm})"
        raise NotFinite(
            f"step {step}: the {what} is not finite, sequences {sequences}. {last_good(checkpoints, step)}; "
            f"lower learning_rate, lengthen warmup_steps or set gradient_clip, then submit again"
            f"{how_to_go_on(checkpoints, step, section)}"
        )


def last_good(checkpoints: Location, step: int) -> str:
    """The newest checkpoint from before `step`, in words."""
    names = [name for name in committed(checkpoints) if step_of(name) < step]
    return f"The last good checkpoint is {names[0]}" if names else "There is no checkpoint from before this step"


def how_to_go_on(checkpoints: Location, step: int, section: str) -> str:
    """What makes a changed recipe, whose stage has another directory, continue from `last_good`; "" without one."""
    if not any(step_of(name) < step for name in committed(checkpoints)):
        return ""
    return (
        f". To go on from that checkpoint with another learning_rate, submit jobs/{section}.py with --resume-anyway "
        f"stage_fingerprint --resume-anyway {section}.learning_rate, and likewise for any other key that you change; "
        f"without them it starts again from step 0"
    )


def refuse_spike(step: int, words: str, checkpoints: Location, section: str) -> NoReturn:
    """Raise UserError for a loss that stands out, where the recipe wants to stop there."""
    raise UserError(
        f'{words}. {last_good(checkpoints, step)}; lower learning_rate, or set on_loss_spike to "warn" to go on '
        f"through it, then submit again{how_to_go_on(checkpoints, step, section)}"
    )


class SpikeWatch:
    """Compares each loss with the median of the SPIKE_STEPS before it, in this attempt."""

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_STEPS)

    def spike(self, loss: float) -> str | None:
        """How far a loss (nats) stands out, in words; None where it does not."""
        usual = statistics.median(self.losses) if len(self.losses) >= SPIKE_FIRST_STEPS else None
        self.losses.append(loss)
        if self.factor is None or usual is None or loss <= self.factor * usual:
            return None
        return (
            f"loss {loss:.4f} is {loss / usual:.1f} times the median {usual:.4f} of the steps before "
            f"(loss_spike_factor {self.factor:g})"
        )
