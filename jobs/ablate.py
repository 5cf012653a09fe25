"""Run a study of many variants and seeds through Ray Tune, and collect the numbers of its finished trials.

    python jobs/ablate.py jobs/recipes/reproduction/ablations.toml [--out RESULTS.json] [--side-by-side 2]
                          [--only VARIANT ...] [--section.key value ...]

Trials that are done are not run again; one that was cut short continues.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from ultralong_ray.job import connect_to_ray
from ultralong_ray.trials import collect, read_study, run_study
from ultralong_ray.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of all finished trials; default: nothing is collected")
    parser.add_argument("--side-by-side", type=int, default=1, help="trials at a time; default 1")
    parser.add_argument("--only", nargs="*", help="variants; default: all")
    parser.add_argument("--collect-only", action="store_true", help="run nothing")
    arguments, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        trials = read_study(arguments.study, tuple(overrides))
        chosen = [trial for trial in trials if arguments.only is None or trial.variant in arguments.only]
        if not arguments.collect_only:
            connect_to_ray()
            run_study(chosen, arguments.side_by_side, Path(__file__).resolve().parent)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if arguments.out is not None:
            found = collect(read_study(arguments.study, tuple(overrides)))
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{len(found)} trials: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
