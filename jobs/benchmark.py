"""Time training steps (`train`), long prompts (`prefill`) or the prepare stage (`data`), and peers: a JSON file."""

import sys

from ultralong_ray.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
