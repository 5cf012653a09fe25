"""The trials of [tune]: several short runs at once, the worse ones ended early, a table of all of them.

python jobs/tune.py RECIPE [--only VARIANT ...] [--prepare-only] [--section.key value ...]

Trials that are over are not run again; one that was cut short continues. --prepare-only packs what they will read and
stops: that takes no GPU, and no more of the base model than its tokenizer.
"""

from ultralong_ray.job import Only, Several, guarded
from ultralong_ray.tune.describe import describe_trials
from ultralong_ray.tune.run import prepare, tune

PREPARE_ONLY = Only(
    "--prepare-only",
    "pack what the trials read and stop",
    lambda recipe, path, _, only: prepare(recipe, path, only),
)
ONLY = Several("--only", "VARIANT", "run only these variants of [tune.variants]", "+")

if __name__ == "__main__":
    guarded(lambda recipe, path, _, only: tune(recipe, path, only), PREPARE_ONLY, ONLY, describe_trials)
