"""How long a step, and a collective within it, may take before silence means a hang: pure.

Flows in: the FLOPs of a step and the peak of the workers. Flows out: seconds.
"""

from __future__ import annotations

from datetime import timedelta

FIRST_STEP_FACTOR = 10.0  # the first step of an attempt may take so many times a recipe's hang_timeout_seconds
LEAST_FIRST_STEP_SECONDS = 1800.0  # kernels are compiled and files opened in it
SLOWEST_MFU = 0.05  # of a healthy run, in causal model FLOPs: a tenth of what was measured
LEAST_CHECKPOINT_SECONDS = 3600.0  # outages that an upload outlasts included
LATER_SECONDS = 600.0  # than the watchdog, which speaks first: it knows who is to blame


def longest_step_seconds(model_flops_causal: float, workers: int, peak_flops: float | None) -> float:
    """Of a healthy run, without a median of steps to go by: the 8B recipes plan with half an hour a step."""
    if peak_flops is None:
        return LEAST_FIRST_STEP_SECONDS
    return max(LEAST_FIRST_STEP_SECONDS, model_flops_causal / (workers * peak_flops * SLOWEST_MFU))


def collective_timeout(step_seconds: float) -> timedelta:
    """The timeout of process groups for steps that may take `step_seconds`. Ranks also wait for checkpoints in one.

    The host queues a whole forward pass and some layers of the backward pass ahead of the GPU, and NCCL counts a
    collective's time from its queueing (WorkNCCL::checkTimeout), so most of a step may pass before it even begins.
    torch's own timeout for NCCL is ten minutes.
    """
    return timedelta(seconds=max(step_seconds, LEAST_CHECKPOINT_SECONDS) + LATER_SECONDS)
