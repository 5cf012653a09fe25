"""Time training steps (`train`), checkpoints, long prompts (`prefill`), data preparation, and peers: a JSON file."""

import sys

from ultralong_ray.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
