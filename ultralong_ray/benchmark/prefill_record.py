"""`python jobs/benchmark.py prefill ...` in the parent process: a Prefill in, its JSON and lines for a terminal out."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

from ultralong_ray.benchmark.launch import RunFailed, run_ranks, set_environment
from ultralong_ray.benchmark.prefill import Prefill
from ultralong_ray.benchmark.record import GIB, environment
from ultralong_ray.flops import ModelShape, mfu, prefill_flops
from ultralong_ray.planner.hardware import peak_flops
from ultralong_ray.storage import Location

MODULE = "ultralong_ray.benchmark.prefill"


def run_prefill(prefill: Prefill, command: list[str], out: Location) -> dict[str, Any]:
    """Run it in fresh processes, write `out` and return what was written; a failed run is recorded with its reason.

    Raises UserError for a command that cannot run at all.
    """
    prefill.check()
    set_environment(prefill.device)
    setup = {key: value for key, value in dataclasses.asdict(prefill).items() if key != "began"}
    result = {"command": command, "setup": setup | {"precision": prefill.precision}}
    result["environment"] = environment(prefill.device)
    try:
        answers = run_ranks(MODULE, prefill.num_gpus, prefill.device, prefill, prefill.limit_seconds)
        result |= {"status": "ok", **prefill_entry(prefill, answers)}
    except RunFailed as error:
        result |= {"status": "failed", "reason": str(error)}
    result["seconds"] = round(time.time() - prefill.began, 1)
    out.write_json(result)
    return result


def prefill_entry(prefill: Prefill, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured, from the `answers` by rank. Everything lasts as long as on its slowest rank."""
    first = answers[0]
    shape = ModelShape.from_config(prefill.config)
    seconds = max(answer["prefill_seconds"] for answer in answers)
    by_token = [max(times) for times in zip(*(answer["decode_seconds"] for answer in answers), strict=True)]
    flops = prefill_flops(shape, prefill.length)
    peak = peak_flops(first["device"], None)
    memory = {key: [answer[key] for answer in answers] for key in first if key.startswith(("peak_", "kv_"))}
    return {
        "device": first["device"],
        "kernel": first["kernel"],
        "build_seconds": first["build_seconds"],
        "prefill": {
            "seconds": seconds,
            "tokens_per_second": prefill.length / seconds,
            "mfu_causal": mfu(flops, seconds, prefill.num_gpus, peak),
            "flops, causal (2Ns + 2Lhs^2)": flops,
            "logits_finite": all(answer["finite"] for answer in answers),
        },
        "decode": {
            "tokens": first["tokens"],
            "seconds_by_token": by_token,
            "tokens_per_second": len(by_token) / sum(by_token),
            "median_tokens_per_second": 1 / statistics.median(by_token),
            "ranks_agree": all(answer["tokens"] == first["tokens"] for answer in answers),
        },
        "kv_cache": _cache_entry(prefill, shape, memory),
        "by_rank": memory,
    }


def _cache_entry(prefill: Prefill, shape: ModelShape, memory: dict[str, list[Any]]) -> dict[str, Any]:
    """Bytes of all ranks together: by arithmetic for prompt and decoded tokens, of the buffers, as the GPU counts."""
    number = 2 if prefill.precision == "bfloat16" else 4  # bytes
    a_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * number
    arithmetic = a_token * (prefill.length + prefill.decode)
    on_device = sum(memory["kv_bytes_on_device"]) or None
    return {
        "bytes_by_arithmetic": arithmetic,
        "bytes_of_buffers": sum(memory["kv_bytes"]),
        "bytes_on_device": on_device,
        "over_arithmetic": (on_device or sum(memory["kv_bytes"])) / arithmetic - 1,
        "tokens_held": sum(memory["kv_rows"]),
    }


def prefill_table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    prefill, decode, cache = result["prefill"], result["decode"], result["kv_cache"]
    share = "" if prefill["mfu_causal"] is None else f", causal MFU {prefill['mfu_causal']:.3f}"
    peak = max(result["by_rank"].get("peak_gpu_gib", result["by_rank"]["peak_host_gib"]))
    return "\n".join(
        (
            f"prefill  {prefill['seconds']:.3f} s, {prefill['tokens_per_second']:,.0f} tokens/s{share}",
            f"decode   {decode['tokens_per_second']:.2f} tokens/s over {len(decode['tokens'])} tokens",
            f"cache    {cache['bytes_of_buffers'] / GIB:.3f} GiB over all ranks, {cache['over_arithmetic']:+.2%} "
            f"against arithmetic",
            f"memory   {peak:.2f} GiB on the fullest rank, kernel {result['kernel']}",
        )
    )
