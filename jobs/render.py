"""The Kubernetes manifests of a recipe: exactly the nodes, GPUs and memory that its plan takes.

    python jobs/render.py RECIPE.toml --platform aws-p5 [--cluster 16x8xH100] [--queue kueue] [--out DIR]
                          [--with watching] [--with tls] [--section.key value ...]

Writes a kustomize folder: `kubectl kustomize DIR` prints the manifests. Exit status 2, with words, when no cluster
could run the recipe so.
"""

import argparse
import os
import sys
from pathlib import Path

from ultralong_ray.manifests import EXTRAS, PLATFORMS, QUEUES, hardware_overrides, render
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.recipe import load_recipe
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", help="TOML file, for example jobs/recipes/llama31_8b_1m.toml")
    parser.add_argument("--platform", choices=PLATFORMS, required=True)
    parser.add_argument("--queue", choices=QUEUES, help="who admits the jobs; default: Ray's autoscaler alone")
    parser.add_argument("--with", choices=EXTRAS, action="append", default=[], dest="extras", help="may be repeated")
    parser.add_argument("--cluster", help="4xH200, or 16x8xH100 (nodes x GPUs x name); default: the recipe's [cluster]")
    parser.add_argument("--out", type=Path, help="default: runs/manifests/<name of the recipe>")
    arguments, overrides = parser.parse_known_args()
    try:
        if arguments.cluster is not None:
            overrides = [*hardware_overrides(parse_cluster(arguments.cluster)), *overrides]
        recipe = load_recipe(arguments.recipe, overrides)
        out: Path = (arguments.out or CLUSTER.parent / "runs" / "manifests" / recipe.name).resolve()
        base = os.path.relpath(CLUSTER, out)
        text = Path(arguments.recipe).read_text(encoding="utf-8")
        files = render(recipe, text, overrides, arguments.platform, base, arguments.queue, tuple(arguments.extras))
        for name, content in files.items():
            Location.of(out / name).write_bytes(content.encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"manifests: {out} (look: kubectl kustomize {out})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
