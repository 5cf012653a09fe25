"""Learning rates at the joints of each schedule."""

from __future__ import annotations

import pytest

from ultralong_ray.config import PretrainConfig
from ultralong_ray.train.schedule import learning_rate


def rates(num_steps: int, **fields: object) -> list[float]:
    train = PretrainConfig.model_validate({"global_batch_sequences": 1, "learning_rate": 2.0, **fields})
    return [learning_rate(train, step, num_steps) for step in range(1, num_steps + 1)]


def test_constant_is_constant_after_a_linear_warm_up() -> None:
    assert rates(3) == [2.0, 2.0, 2.0]
    assert rates(5, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_and_cosine_end_at_the_floor() -> None:
    assert rates(5, schedule="linear", min_learning_rate_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
    cosine = rates(5, schedule="cosine", min_learning_rate_ratio=0.1)
    assert cosine == pytest.approx([2.0, 1.73640, 1.1, 0.46360, 0.2], abs=1e-5)
    assert rates(6, schedule="cosine", warmup_steps=2)[:2] == [1.0, 2.0]
    assert rates(6, schedule="cosine", warmup_steps=2)[-1] == pytest.approx(0.0)


def test_a_run_of_one_step_has_the_full_rate() -> None:
    assert rates(1, schedule="cosine") == [2.0]
