"""What asks a rank to leave before the last step, as numbers that ride on a step's reduction.

Flows in: the notices of all ranks. Flows out: why the run stops here, in words. The largest number counts.
"""

from __future__ import annotations

NONE, TERMINATED, PREEMPTED, STOPPED = range(4)
FAILED = 9  # nobody asks, but the last checkpoint could not be written
WORDS = {
    TERMINATED: "SIGTERM reached",
    PREEMPTED: "Ray announced that a node will be taken away, to",
    STOPPED: "a stop of the whole run was asked for, to",
}


class Interrupted(Exception):
    """The run was asked to leave and has saved itself: `step` is committed. `notice`: the reason's number."""

    def __init__(self, notice: int, step: int, cause: str) -> None:
        super().__init__(f"{cause}; step {step} is saved")
        self.notice, self.step, self.cause = notice, step, cause

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, int, str]]:
        """Ray hands it from a worker to its controller, where pickle would call `__init__` with the message alone."""
        return Interrupted, (self.notice, self.step, self.cause)


def cause_of(notices: list[int]) -> str:
    """Words for the notices by rank."""
    notice = max(notices)
    ranks = [str(rank) for rank, found in enumerate(notices) if found == notice]
    return f"{WORDS[notice]} rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"
