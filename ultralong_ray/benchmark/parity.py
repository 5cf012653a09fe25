"""`python jobs/benchmark.py parity ...`: do the engines give the same answers?

Flows in: a model folder and a number of passkey prompts. Flows out: a JSON with all engines' answers, the share that
agree with those of transformers' own attention in one process, and the largest difference of the logits behind the
prompts. Every engine runs in processes of its own; the sharded one at all degrees that the GPUs and the heads allow.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.benchmark.launch import run_ranks, set_environment
from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least, model_folder
from ultralong_ray.config.degrees import heads_can_split, model_heads
from ultralong_ray.eval.chunk_attention import CHUNK_ATTENTION, Attention
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.passkey import build_prompt
from ultralong_ray.eval.sharded import ShardedEngine
from ultralong_ray.storage import Location

MODULE = "ultralong_ray.benchmark.parity"
LEAST_SHARE = {"float32": 1.0, "bfloat16": 0.98}  # of answers that must agree
KEPT_LOGITS = 16  # the largest ones behind each prompt


@dataclass(frozen=True, slots=True)
class Parity:
    """What one engine is asked. `ulysses` 0 is the in-process engine, with `attention`."""

    folder: str
    precision: str
    lengths: tuple[int, ...]
    prompts: int
    new_tokens: int
    chunk: int
    chat: bool
    ulysses: int = 0
    attention: Attention = "sdpa"


def add_parity(add: Any) -> None:
    """The verb's arguments."""
    add("--model", required=True, help="Hugging Face folder")
    add("--gpus", type=at_least(1), default=2, help="processes, one per GPU")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    add("--lengths", type=at_least(1), nargs="+", default=[192, 256, 320, 384, 512], help="tokens")
    add("--prompts", type=at_least(1), default=50)
    add("--decode", type=at_least(1), default=8, help="tokens of an answer")
    add("--prefill-chunk", type=at_least(1), default=128, help="tokens of the prompt at a time")
    add("--limit-seconds", type=float, default=570.0, help="of the whole command")
    add("--out", required=True, help="JSON file")


def run_parity(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Ask all engines, write `options.out`, return what was written. Raises: RunFailed, UserError."""
    folder = model_folder(options.model)
    set_environment(options.device)
    began = time.monotonic()
    asked = Parity(
        str(folder),
        options.precision,
        tuple(options.lengths),
        options.prompts,
        options.decode,
        options.prefill_chunk,
        (folder / "chat_template.jinja").exists(),
    )
    runs: dict[str, Any] = {}
    ours = (f"in process, {CHUNK_ATTENTION}", 1, replace(asked, attention=CHUNK_ATTENTION))
    for name, ranks, work in ("in_process", 1, asked), ours, *_sharded(asked, options.gpus, folder):
        left = options.limit_seconds - (time.monotonic() - began)
        runs[name] = run_ranks(MODULE, ranks, options.device, work, left)[0]
    reference = runs["in_process"]
    engines = {name: _compared(run, reference) for name, run in runs.items() if name != "in_process"}
    result = {
        "command": command,
        "environment": environment(options.device),
        "setup": {"model": folder.name, "precision": options.precision, "prompts": options.prompts}
        | {"lengths": options.lengths, "new_tokens": options.decode, "prefill_chunk": options.prefill_chunk},
        "seconds_of_transformers_attention": reference["seconds"],
        "engines": engines,
        "least_share": LEAST_SHARE[options.precision],
        "passed": all(engine["share_equal"] >= LEAST_SHARE[options.precision] for engine in engines.values()),
        "answers": {name: run["answers"] for name, run in runs.items()},
        "expected": reference["expected"],
        "seconds": round(time.monotonic() - began, 1),
    }
    Location.of(options.out).write_json(result)
    return result


def _sharded(asked: Parity, gpus: int, folder: Path) -> list[tuple[str, int, Parity]]:
    """Every layout of `gpus` ranks: Ulysses degree x ring degree."""
    heads = model_heads(Location.of(folder / "config.json").read_json())
    fitting = [degree for degree in range(1, gpus + 1) if gpus % degree == 0 and heads_can_split(*heads, degree)]
    return [(f"sharded {degree}x{gpus // degree}", gpus, replace(asked, ulysses=degree)) for degree in fitting]


def _compared(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(run["answers"], reference["answers"], strict=True))
    logits = [
        abs(mine[token] - value)
        for mine, theirs in zip(run["logits"], reference["logits"], strict=True)
        for token, value in theirs.items()
        if token in mine
    ]
    return {
        "share_equal": sum(one == other for one, other in pairs) / len(pairs),
        "different": [number for number, (one, other) in enumerate(pairs) if one != other],
        "largest_logit_difference": max(logits),
        "seconds": run["seconds"],
    }


def run(asked: Parity, device: torch.device) -> dict[str, Any]:
    """One rank's part: answers, and the largest logits behind every prompt."""
    shared: dict[str, Any] = {"precision": asked.precision, "prefill_chunk_tokens": asked.chunk}
    engine: Any = (
        ShardedEngine(Path(asked.folder), ulysses_degree=asked.ulysses, device=device, **shared)
        if asked.ulysses
        else Engine(Path(asked.folder), device=str(device), attention=asked.attention, **shared)
    )
    answers, logits, expected = [], [], []
    dist.barrier()
    began = time.perf_counter()
    for number in range(asked.prompts):
        length = asked.lengths[number % len(asked.lengths)]
        depth = round(100 * number / max(1, asked.prompts - 1), 1)
        made = build_prompt(
            engine.tokenizer,
            context_length_tokens=length,
            depth_percent=depth,
            sample=number,
            seed=3,
            max_new_tokens=asked.new_tokens,
            chat_template=asked.chat,
        )
        top = engine.prefill(made.ids).float().topk(KEPT_LOGITS)
        logits.append({str(int(token)): float(value) for token, value in zip(top.indices, top.values, strict=True)})
        answers.append(engine.answer(made.ids, asked.new_tokens))
        expected.append(made.expected)
    return {
        "answers": answers,
        "logits": logits,
        "expected": expected,
        "seconds": time.perf_counter() - began,
    }


def parity_table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    right = sum(want in said for want, said in zip(result["expected"], result["answers"]["in_process"], strict=True))
    rows = [f"{'in process, sdpa':27s} {right} of {len(result['expected'])} passkeys right"]
    rows += [
        f"{name:27s} {engine['share_equal']:.1%} of the answers equal, logits differ by at most "
        f"{engine['largest_logit_difference']:.2g}"
        for name, engine in result["engines"].items()
    ]
    return "\n".join(rows)
