"""Time the training step (`train`) or the prepare stage (`data`), and their peers, on this machine: a JSON file."""

import sys

from ultralong_ray.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
