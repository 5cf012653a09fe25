"""The trials of [tune]: several short runs at once, the worse ones ended early, a table of all of them.

python jobs/tune.py RECIPE [--only VARIANT ...] [--section.key value ...]

Trials that are over are not run again; one that was cut short continues.
"""

from ultralong_ray.job import Several, guarded
from ultralong_ray.tune.run import tune

ONLY = Several("--only", "VARIANT", "run only these variants of [tune.variants]", "+")

if __name__ == "__main__":
    guarded(lambda recipe, path, _, only: tune(recipe, path, only), several=ONLY)
