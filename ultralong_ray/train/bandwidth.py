"""How fast the ranks that share a sequence exchange tensors: a process group in, GB/s out. torch 2.11-2.13."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

BYTES = {"cuda": 2**28, "cpu": 2**20}  # sent by one rank in a round: large enough for full speed, small for a test
ROUNDS = 3
# GB/s below which something is wrong, a tenth of the data sheets: NVLink of H100 and H200 (450 GB/s a direction),
# and a network port of 400 Gbit/s a GPU.
FLOOR_ONE_HOST = 45.0
FLOOR_BETWEEN_HOSTS = 5.0


def measured_gigabytes_per_second(group: dist.ProcessGroup, device: torch.device, ring: bool) -> float:
    """What one rank sends to others of `group` in a second: all to all, or to its neighbour in a ring. Collective."""
    size = dist.get_world_size(group)
    sent = torch.ones(BYTES[device.type] // size * size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = []
    for _ in range(ROUNDS + 1):  # the first builds the connections
        _wait(device)
        began = time.perf_counter()
        if ring:
            _pass_on(sent, received, group)
        else:
            dist.all_to_all_single(received, sent, group=group)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    away = sent.numel() if ring else sent.numel() * (size - 1) // size  # a rank's own block does not travel
    return away / min(seconds[1:]) / 1e9


def slow_link(gigabytes_per_second: float, one_host: bool) -> str | None:
    """Why a measured speed is too low to be right, None where it is not."""
    floor = FLOOR_ONE_HOST if one_host else FLOOR_BETWEEN_HOSTS
    if gigabytes_per_second >= floor:
        return None
    where = (
        "within one host; is there no NVLink, or is NCCL_P2P_DISABLE set?" if one_host else "between hosts; does NCCL "
    )
    advice = where if one_host else where + "use the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)?"
    return f"below {floor:g} GB/s {advice}"


def _pass_on(sent: torch.Tensor, received: torch.Tensor, group: dist.ProcessGroup) -> None:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, received, before, group)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
