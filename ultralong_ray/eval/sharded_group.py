"""The sharded engine as one engine of an evaluation: a group of Ray actors, one rank each, behind one object.

In go requests, in one worker; out come rank 0's answers. The actors form a process group of their own (NCCL with GPUs,
gloo without) and hold the model until the worker ends. They are owned by the worker: Ray ends them when it is gone. A
rank that is lost takes the worker with it, so that the cell is tried again by a new group. The placement group that
they stand in is made and removed by the worker's driver, since Ray keeps one that a dead actor made until the whole job
ends (GcsPlacementGroup::IsPlacementGroupLifetimeDone). Written against Ray 2.60.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.degrees import heads_can_split
from ultralong_ray.config.engines import ShardedEngine as ShardedConfig
from ultralong_ray.eval.engine import Request
from ultralong_ray.parallel.allocator import allocator_environment
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

LOST_RANK_STATUS = 17  # with which a worker ends that lost a rank
START_SECONDS = 600.0  # for the cluster to make room for a group
LOSS_SEEN_SECONDS = 15.0  # within which Ray says that a rank is lost, whose neighbours failed before


class ShardedRank:
    """One rank: a process with the whole weights and its part of the keys and values."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be reached: its host, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, rank: int, world: int, address: tuple[str, int], config: EvaluateConfig, folder: str) -> None:
        """Join the process group and load the model. Raises: UserError for degrees that do not fit the model."""
        import torch
        import torch.distributed as dist

        from ultralong_ray.eval.sharded import GROUP_TIMEOUT, ShardedEngine

        assert isinstance(config.engine, ShardedConfig)
        on_gpu = config.gpus_per_task > 0 and torch.cuda.is_available()
        torch.set_num_threads(max(1, int(config.cpus_per_task)))
        device = torch.device("cuda:0" if on_gpu else "cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        host, port = address
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=world,
            timeout=GROUP_TIMEOUT,
        )
        self._engine = ShardedEngine(
            Path(folder),
            precision=config.precision,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            ulysses_degree=config.engine.ulysses_degree or widest_ulysses(Path(folder), world),
            device=device,
        )

    def answer(self, request: Request, ids: NDArray[np.int32]) -> str:
        return self._engine.answers([replace(request, ids=ids.tolist())])[0]

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._engine.token_losses(input_ids)

    def continuation_scores(
        self, prompt: NDArray[np.int32], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        return self._engine.continuation_scores(prompt.tolist(), continuations)


def widest_ulysses(folder: Path, degree: int) -> int:
    """The largest divisor of `degree` that can split the heads of a model: fewer steps around the ring."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    heads = config.num_attention_heads
    fitting = (part for part in range(degree, 0, -1) if degree % part == 0)
    return next(part for part in fitting if heads_can_split(heads, config.num_key_value_heads or heads, part))


def reserve_group(config: EvaluateConfig) -> PlacementGroup:
    """Room for the actors of one group. Whoever asks for it removes it."""
    assert isinstance(config.engine, ShardedConfig)
    needs = {"CPU": config.cpus_per_task, "GPU": config.gpus_per_task}
    return placement_group([{k: v for k, v in needs.items() if v}] * config.engine.degree, strategy="PACK")


class ShardedGroup:
    """An `engine.Engine` whose work is done by `degree` actors."""

    def __init__(self, config: EvaluateConfig, folder: Path, room: PlacementGroup) -> None:
        """`room` is what `reserve_group` gave.

        Raises: UserError when the cluster has no room for a group within START_SECONDS, or degrees do not fit.
        """
        from transformers import AutoTokenizer

        assert isinstance(config.engine, ShardedConfig)
        degree = config.engine.degree
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not room.wait(START_SECONDS):
            raise UserError(
                f"evaluate.engine.degree {degree}: the cluster had no room for {degree} processes of "
                f"{config.cpus_per_task:g} CPU and {config.gpus_per_task:g} GPU within {START_SECONDS:.0f} s; lower "
                f"it, or add nodes"
            )
        actor: Any = ray.remote(ShardedRank)
        self._ranks = [
            actor.options(
                num_cpus=config.cpus_per_task,
                num_gpus=config.gpus_per_task,
                runtime_env={"env_vars": allocator_environment()} if config.gpus_per_task else None,
                scheduling_strategy=PlacementGroupSchedulingStrategy(room, rank),
            ).remote()
            for rank in range(degree)
        ]
        try:
            address = self._first_of([self._ranks[0].address.remote()])
            starts = (rank.start.remote(i, degree, address, config, str(folder)) for i, rank in enumerate(self._ranks))
            self._first_of(list(starts))
        except BaseException:
            self.close()  # the next group takes their room
            raise

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """One after the other, each by all ranks."""
        found = []
        for request in requests:
            ids = ray.put(np.asarray(request.ids, dtype=np.int32))
            light = replace(request, ids=[])
            found.append(self._first_of([rank.answer.remote(light, ids) for rank in self._ranks]))
        return found

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1]."""
        ids = ray.put(input_ids)
        return self._first_of([rank.token_losses.remote(ids) for rank in self._ranks])

    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability behind the prompt in nats, and whether it is the greedy one."""
        ids = ray.put(np.asarray(prompt, dtype=np.int32))
        return self._first_of([rank.continuation_scores.remote(ids, continuations) for rank in self._ranks])

    def close(self) -> None:
        """End the actors; their room is free for others."""
        for rank in self._ranks:
            ray.kill(rank)

    def _first_of(self, references: list[Any]) -> Any:
        """Rank 0's value once all are done. The first failure counts: the others may wait for that rank for ever.

        Raises: UserError of a rank as it is. Does not return when a rank is lost: this worker ends with it.
        """
        waiting = list(references)
        try:
            while waiting:
                ready, waiting = ray.wait(waiting)
                ray.get(ready)
        except RayActorError as error:
            _end_worker(error)
            raise
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            # with gloo the neighbours of a lost rank fail at once, perhaps before Ray says that it is gone
            if (lost := _loss_among(references)) is not None:
                _end_worker(lost)
            raise
        return ray.get(references[0])


def _loss_among(references: list[Any]) -> RayActorError | None:
    """What Ray says of the first actor that is gone; None when none is, as far as is known in time."""
    ready, _ = ray.wait(references, num_returns=len(references), timeout=LOSS_SEEN_SECONDS)
    for reference in ready:
        try:
            ray.get(reference)
        except RayActorError as error:
            return error
        except RayTaskError:
            continue
    return None


def _end_worker(error: RayActorError) -> None:
    """End this process, where it is an actor, so that whoever started it starts another."""
    if ray.get_runtime_context().get_actor_id():
        logger.error("a rank of the sharded engine was lost (%s); its worker ends and is replaced", error)
        os._exit(LOST_RANK_STATUS)
