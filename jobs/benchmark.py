"""Time the training step and its peers, or long prefills, on the GPUs of this machine; the result is a JSON file."""

import sys

from ultralong_ray.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
