"""Counts and shares of domains among the chat samples that are drawn."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.data.columns import table_of
from ultralong_ray.config import SftConfig
from ultralong_ray.data.sft_mix import choose_samples
from ultralong_ray.types import UserError

ROWS = [
    (f"{domain}/{i}", domain, 10)
    for domain, count in (("general", 100), ("math", 60), ("code", 40))
    for i in range(count)
]


def chosen(settings: SftConfig, rows: list[tuple[str, str, int]] = ROWS) -> list[str]:
    """The ids drawn from these samples, in their order."""
    picked = choose_samples(np.arange(len(rows)), table_of(rows, [len(rows)]), settings, "nothing left out")
    return [rows[row][0] for row in picked.tolist()]


def config(**fields: Any) -> SftConfig:
    train = {"global_batch_sequences": 1, "learning_rate": 1e-4, "sequence_length": 64, "max_sample_tokens": 64}
    return SftConfig.model_validate({**train, "sources": [{"uri": "x"}], **fields})


def drawn(**fields: Any) -> Counter[str]:
    return Counter(name.split("/")[0] for name in chosen(config(**fields)))


def test_without_a_mix_the_sources_decide() -> None:
    assert drawn() == {"general": 100, "math": 60, "code": 40}
    assert drawn(num_samples=50).total() == 50


def test_shares_and_counts() -> None:
    assert drawn(domain_mix={"general": 1, "math": 1, "code": 2}, num_samples=40) == {
        "general": 10,
        "math": 10,
        "code": 20,
    }
    assert drawn(domain_mix={"general": 1, "math": 1, "code": 1}, num_samples=50).total() == 50
    assert drawn(domain_samples={"math": 7, "code": 3}) == {"math": 7, "code": 3}
    # without a number, as many as the scarcest domain allows: 40 of code are a half
    assert drawn(domain_mix={"general": 1, "code": 1}) == {"general": 40, "code": 40}


def test_the_draw_does_not_depend_on_the_order_and_grows_with_the_number() -> None:
    shuffled = list(ROWS)
    random.Random(0).shuffle(shuffled)
    mix = {"general": 0.5, "math": 0.3, "code": 0.2}
    small = config(domain_mix=mix, num_samples=40)
    first = chosen(small)
    assert chosen(small, shuffled) == first != sorted(first)
    assert set(first) < set(chosen(config(domain_mix=mix, num_samples=80)))
    assert set(first) != set(chosen(config(domain_mix=mix, num_samples=40, seed=1)))


def test_what_cannot_be_had_is_refused_with_the_arithmetic() -> None:
    def message(**fields: Any) -> str:
        with pytest.raises(UserError) as error:
            drawn(**fields)
        return str(error.value)

    assert "sft.num_samples 300: the sources hold 200 samples" in message(num_samples=300)
    assert "code: needs 50, has 40" in message(domain_samples={"code": 50, "math": 60})
    assert "code: needs 90, has 40" in message(domain_mix={"code": 0.9, "math": 0.1}, num_samples=100)
    assert "names 'maths', but the samples have the domains code, general, math" in message(domain_mix={"maths": 1})
    assert "nothing left out" in message(domain_samples={"code": 50})


def test_one_way_to_mix() -> None:
    with pytest.raises(ValueError, match="have nothing to say"):
        config(domain_samples={"code": 1}, num_samples=5)
    with pytest.raises(ValueError, match="have nothing to say"):
        config(domain_samples={"code": 1}, domain_mix={"code": 1})
