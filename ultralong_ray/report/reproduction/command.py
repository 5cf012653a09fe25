"""Results of the reproduction: finished runs to one JSON, and that to figures and tables.

python jobs/figures.py gather RUNS [--out jobs/results/reproduction.json] [--note key=value ...]
python jobs/figures.py [--results jobs/results] [--out jobs/results/figures]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ultralong_ray.report.reproduction.figures import draw
from ultralong_ray.report.reproduction.gather import gather, read_results
from ultralong_ray.report.reproduction.tables import tables
from ultralong_ray.types import UserError

RESULTS = Path("jobs/results")
FILE = "reproduction.json"


def figures_command(arguments: list[str]) -> int:
    """Parse the command line, do it, print the tables. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gathering = arguments[:1] == ["gather"]
    if gathering:
        parser.add_argument("runs", type=Path, help="folder of runs: base_512, base_4k, extend_128k, ..., ablations")
        parser.add_argument("--out", type=Path, default=RESULTS / FILE, help="JSON to write or update: %(default)s")
        what = "key=value or part.key=value of what run folders do not know; may be repeated"
        parser.add_argument("--note", action="append", default=[], metavar="KEY=VALUE", help=what)
    else:
        parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of {FILE}: %(default)s")
        parser.add_argument(
            "--out", type=Path, default=RESULTS / "figures", help="folder of the SVG files: %(default)s"
        )
    parsed = parser.parse_args(arguments[gathering:])
    try:
        if gathering:
            made = gather(parsed.runs, parsed.out, parsed.note)["tables"]
            print(f"results: {parsed.out}")
        else:
            results = read_results(parsed.results / FILE)
            draw(results, parsed.out)
            made = tables(results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + "\n\n".join(made.values()))
    return 0
