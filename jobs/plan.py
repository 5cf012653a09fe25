"""What every training stage of a recipe will take on a cluster, before anything starts.

    python jobs/plan.py RECIPE.toml [--cluster 16x8xH100] [--json] [--section.key value ...]

Exit status 2, with the smallest change that would help, when a stage cannot fit.
"""

import argparse
import json
import sys

from ultralong_ray.plan import num_steps_known, plan_stages
from ultralong_ray.planner.hardware import parse_cluster
from ultralong_ray.planner.plan import as_json
from ultralong_ray.planner.words import describe_plan
from ultralong_ray.recipe import load_recipe, load_recipe_on
from ultralong_ray.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", help="TOML file, for example jobs/recipes/llama31_8b_1m.toml")
    parser.add_argument("--cluster", help="4xH200, or 16x8xH100 (nodes x GPUs x name); default: the recipe's [cluster]")
    parser.add_argument("--host-memory-gib", type=float, help="host memory of a node; default: the vendor's servers")
    parser.add_argument("--network-gbs", type=float, help="GB/s between nodes, per GPU and direction")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    arguments, overrides = parser.parse_known_args()
    try:
        hardware = None
        if arguments.cluster is not None:
            hardware = parse_cluster(arguments.cluster, arguments.host_memory_gib, arguments.network_gbs)
            recipe = load_recipe_on(arguments.recipe, hardware.num_gpus, overrides)
        elif arguments.host_memory_gib is not None or arguments.network_gbs is not None:
            raise UserError("--host-memory-gib and --network-gbs describe a --cluster; give one, as in 4xH200")
        else:
            recipe = load_recipe(arguments.recipe, overrides)
        outcomes = plan_stages(recipe, hardware)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    refused = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
    planned = [outcome for outcome in outcomes if not isinstance(outcome, UserError)]
    if arguments.json:
        print(json.dumps([*map(as_json, planned), *({"refused": str(refusal)} for refusal in refused)], indent=2))
    else:
        print("\n\n".join(describe_plan(plan, num_steps_known(recipe, plan.section.name)) for plan in planned))
    for refusal in refused:
        print(f"error: {refusal}", file=sys.stderr)
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
