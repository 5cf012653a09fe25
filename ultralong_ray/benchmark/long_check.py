"""One layer at the longest lengths, through the whole training step, compared with the float32 reference.

The step is the ordinary one at full length; only its loss has targets at sampled rows alone, which makes the float32
answer affordable (see reference.py). Compared: the loss, the layer's output at the sampled rows, every weight gradient.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ultralong_ray.benchmark.gradients import likeness, observed_step, whole_weights
from ultralong_ray.benchmark.measure import Work, peak_memory, progress, synchronize
from ultralong_ray.benchmark.ours import Ours, built
from ultralong_ray.benchmark.reference import ReferenceLayer, Targets
from ultralong_ray.benchmark.tokens import slice_of
from ultralong_ray.train.step import to_device

EDGES = (0, 1, 65_535, 65_536, 2**20 - 1, 2**20, 2**21 - 1, 2**21)  # positions where kernels have been seen to break


def target_rows(length: int, num_rows: int, seed: int) -> np.ndarray:
    """Ascending positions: edges, the middle, the end, and draws over the whole sequence. int64 [num_rows]."""
    fixed = {row for row in (*EDGES, length // 2 - 1, length // 2, length - 2) if 0 <= row < length - 1}
    drawn = np.random.default_rng(seed).permutation(length - 1)[:num_rows]
    rows = [*sorted(fixed)[:num_rows], *(row for row in drawn.tolist() if row not in fixed)]
    return np.sort(np.array(rows[: min(num_rows, length - 1)], np.int64))


def run(work: Work, device: torch.device) -> dict[str, Any]:
    """Every rank's part of the contestant, where rows are checked."""
    ours, answer = built(work, device)
    return answer | check_against_reference(ours, work.benchmark.check_rows)


def check_against_reference(ours: Ours, num_rows: int) -> dict[str, Any]:
    """Run one step with `num_rows` targets and compare. Collective; the comparison stands in rank 0's answer."""
    work, device = ours.work, ours.device
    ids = ours.ids(0)
    rows = target_rows(work.setup.length, num_rows, work.benchmark.seed)
    weights = whole_weights(ours.causal_lm)
    mine = np.concatenate([np.arange(start, end) for start, end in ours.segments])
    local = np.flatnonzero(np.isin(mine, rows))
    outputs: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}

    def keep_rows(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        outputs[:] = [inputs[0][0, torch.from_numpy(local).to(device)].detach().float()]  # [rows here, hidden]

    def visit(name: str, gradient: torch.Tensor) -> None:
        if dist.get_rank() == 0:
            gradients[name] = gradient.float().cpu()

    hook = ours.causal_lm.model.norm.register_forward_pre_hook(keep_rows)  # its input is the layer's output
    micro_batch = to_device(slice_of(ids, ours.segments, rows), device)
    synchronize(device)
    started = time.perf_counter()
    numbers = observed_step(ours.engine, lambda: ours.step(micro_batch), visit)
    synchronize(device)
    seconds = time.perf_counter() - started
    hook.remove()
    progress(work, f"step with {len(rows)} targets: {seconds:.1f} s, loss {numbers.loss:.5f}; now the reference")
    answer: dict[str, Any] = {"step_seconds": [seconds], "losses": [numbers.loss], "grad_norms": [numbers.grad_norm]}
    answer |= peak_memory(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the step's buffers, for the reference
    leaves = {name: weight.to(device).float().requires_grad_() for name, weight in weights.items()}
    reference = ReferenceLayer(ours.config, leaves, torch.from_numpy(ids).to(device))
    positions = torch.from_numpy(rows).to(device)
    labels = torch.from_numpy(ids[rows + 1]).to(device)
    loss, expected, expected_rows = reference.solve(Targets(positions, labels))
    errors = _row_errors(outputs[0], expected_rows[torch.from_numpy(np.searchsorted(rows, mine[local])).to(device)])
    tensors = {name: likeness(gradients[name].to(device), expected[name]) for name in gradients}
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    progress(work, f"reference loss {loss:.5f}")
    answer["check"] = {
        "target_rows": len(rows),
        "loss": numbers.loss,
        "reference_loss": loss,
        "output_rows_relative_error": errors,
        "gradients_finite": finite and math.isfinite(numbers.grad_norm),
        "gradients": tensors,
    }
    return answer


def _row_errors(rows: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Largest and mean relative error of rows [n, hidden] over all ranks. Collective."""
    errors = (rows - expected).norm(dim=-1) / expected.norm(dim=-1)  # [n]
    largest = errors.max() if len(errors) else errors.new_zeros(())
    sums = torch.stack([errors.sum(), errors.new_tensor(float(len(errors)))])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    return {"max": largest.item(), "mean": (sums[0] / sums[1]).item()}
