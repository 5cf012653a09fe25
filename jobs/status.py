"""How a training run stands, running or dead: progress, rate, time left, last checkpoint, restarts and their causes.

python jobs/status.py RUN        (a recipe's workdir, or one training stage's directory; local or s3://)
"""

import argparse
import sys

from ultralong_ray.storage import Location, refusals_in_words
from ultralong_ray.train.status import describe_run
from ultralong_ray.types import UserError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Says how a training run stands.")
    parser.add_argument("run", help="a recipe's workdir or a training stage's directory")
    try:
        with refusals_in_words():
            print(describe_run(Location.of(parser.parse_args().run)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
