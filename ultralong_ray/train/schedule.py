"""Learning rate by step: pure."""

from __future__ import annotations

import math

from ultralong_ray.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of step `step` (1-based). Warm-up is linear and its last step already has the full rate.

    cosine and linear fall from there to `min_learning_rate_ratio` of it, which the last step has.
    """
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    first = max(1, train.warmup_steps)
    progress = min(1.0, (step - first) / max(1, num_steps - first))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    floor = train.min_learning_rate_ratio
    return train.learning_rate * (floor + (1 - floor) * remaining)
