"""What `jobs/tune.py` refuses before it asks for a cluster."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.tune.run import tune
from ultralong_ray.types import UserError


def test_a_recipe_without_the_section_is_told_where_its_fields_are(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"has no \[tune\] section.*config/tune.py"):
        tune(tiny_recipe(), "recipe.toml")
