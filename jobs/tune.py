"""The trials of [tune]: several short runs at once, the worse ones ended early, a table of all of them."""

from ultralong_ray.job import guarded
from ultralong_ray.tune.run import tune

if __name__ == "__main__":
    guarded(lambda recipe, path, _: tune(recipe, path))
