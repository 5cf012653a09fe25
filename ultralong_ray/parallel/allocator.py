"""How torch's allocator of GPU memory is told to work: environment variables that a process must have when it starts.

Tensors of hundreds of megabytes come and go in sizes that change from step to step (a cache that grows, layers that
replay). With segments of fixed size the gaps between them add up to gigabytes that nobody can use; the planner reckons
with expandable ones (planner/costs.py, allocator_slack). No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# torch 2.9 and later read the first, and the second where it is absent
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def allocator_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process with a GPU is to be started with: what `environment` says of the allocator, else EXPANDABLE."""
    given = {name: environment[name] for name in VARIABLES if name in environment}
    return given or {VARIABLES[0]: EXPANDABLE}
