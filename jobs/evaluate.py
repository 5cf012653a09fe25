"""Passkey grids, benchmarks and perplexity, fanned out over the cluster; --compare A B sets two evaluated models beside
each other instead."""

import sys

from ultralong_ray.job import run_stages
from ultralong_ray.report.compare import compare_command

if __name__ == "__main__":
    if "--compare" in sys.argv:
        sys.exit(compare_command(sys.argv[1:]))
    run_stages("evaluate")
