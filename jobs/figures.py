"""Figures and tables of the reproduction, from jobs/results/reproduction.json; `gather` makes that from finished runs.

python jobs/figures.py [--results DIR] [--out DIR]
python jobs/figures.py gather RUNS [--out FILE] [--note key=value ...]
"""

import sys

from ultralong_ray.report.reproduction.command import figures_command

if __name__ == "__main__":
    sys.exit(figures_command(sys.argv[1:]))
