"""`jobs/benchmark.py train|prefill|prefix|decoding|parity|checkpoint|kernels|data`: words in, a measurement out."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ultralong_ray.benchmark.checkpoint import Checkpoints
from ultralong_ray.benchmark.checkpoint_record import checkpoint_table, run_checkpoints
from ultralong_ray.benchmark.decoding import add_decoding, decoding_table, run_decoding
from ultralong_ray.benchmark.kernels import add_kernels, kernels_table, run_kernels
from ultralong_ray.benchmark.launch import RunFailed
from ultralong_ray.benchmark.parity import add_parity, parity_table, run_parity
from ultralong_ray.benchmark.prefill import Prefill
from ultralong_ray.benchmark.prefill_record import prefill_table, run_prefill
from ultralong_ray.benchmark.prefix import add_prefix, prefix_table, run_prefix
from ultralong_ray.benchmark.presets import arguments as preset_arguments
from ultralong_ray.benchmark.run import run_benchmark, table
from ultralong_ray.benchmark.setups import SHAPES, Benchmark, Setup, at_least, share
from ultralong_ray.config.degrees import heads_can_split, model_heads
from ultralong_ray.data import benchmark as data_benchmark
from ultralong_ray.storage import Location, refusals_in_words
from ultralong_ray.types import UserError

DEFAULT_CHECK_ROWS = 256


def main(argv: list[str]) -> int:
    """Run the command. Returns 0, 1 when a run of ours failed, or 2 for a mistake that the message explains."""
    try:
        with refusals_in_words():
            if argv[:1] == ["data"]:
                data_benchmark.run(argv[1:])
                return 0
            options = parse(argv)
            table, went_well = _measured(options, ["python", "jobs/benchmark.py", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(table)
    print(f"written: {options.out}")
    return int(not went_well)


def _measured(options: argparse.Namespace, command: list[str]) -> tuple[str, bool]:
    """(what a terminal shows of the verb's result, whether all of ours went well)."""
    out = Location.of(options.out)
    _refuse_unwritable(out)
    if options.verb == "prefill":
        result = run_prefill(prefill_of(options), command, out)
        return prefill_table(result), result["status"] == "ok"
    if options.verb == "prefix":
        result = run_prefix(options, command)
        return prefix_table(result), result["same_answers"]
    if options.verb == "decoding":
        return decoding_table(run_decoding(options, command)), True
    if options.verb == "parity":
        result = run_parity(options, command)
        return parity_table(result), result["passed"]
    if options.verb == "checkpoint":
        result = run_checkpoints(checkpoints_of(options), command, out)
        return checkpoint_table(result), result["status"] == "ok"
    if options.verb == "kernels":
        result = run_kernels(options, command)
        return kernels_table(result), all(row["status"] == "ok" for row in result["rows"])
    result = run_benchmark(benchmark_of(options), command, out)
    return table(result), all(run["status"] == "ok" for run in result["runs"] if run["contestant"] == "ours")


def _refuse_unwritable(out: Location) -> None:
    """Before minutes of GPUs are spent on what could not be kept. Raises UserError."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a JSON file")
    probe = out.parent / f"{out.name}.probe"
    probe.write_bytes(b"")
    probe.delete_file()


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments, those of a preset first so that the command line overrules them."""
    parser = _parser()
    options = parser.parse_args(argv)
    if getattr(options, "preset", None):
        return parser.parse_args([argv[0], *preset_arguments(options.preset, options.gpus, argv[0]), *argv[1:]])
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, dest="verb")
    verbs.add_parser("data", help="the prepare stage beside the bare tokenizer; its own --help lists its arguments")
    _add_train(verbs.add_parser("train", help="training steps, ours and peers'", allow_abbrev=False).add_argument)
    prefill = verbs.add_parser("prefill", help="one long prompt over all GPUs, then decoding", allow_abbrev=False)
    _add_prefill(prefill.add_argument)
    add_prefix(verbs.add_parser("prefix", help="a passkey grid with and without reuse of prompts").add_argument)
    decoding = verbs.add_parser("decoding", help="RULER with answers decoded one by one and together")
    add_decoding(decoding.add_argument)
    add_parity(verbs.add_parser("parity", help="answers of the in-process and the sharded engine").add_argument)
    add_kernels(verbs.add_parser("kernels", help="attention kernels alone, TFLOP/s by length").add_argument)
    checkpoint = verbs.add_parser("checkpoint", help="what checkpoints cost a training loop", allow_abbrev=False)
    _add_checkpoint(checkpoint.add_argument)
    return parser


def _add_common(add: Any) -> None:
    add("--shape", default="llama31_8b", help=f"model shape: {', '.join(SHAPES)}")
    add("--layers", type=at_least(1), help="decoder layers; default: the shape's")
    add("--length", type=at_least(1), default=131072, help="tokens of a sequence")
    add("--gpus", type=at_least(1), default=1, help="processes, one per GPU")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--ulysses", type=at_least(1), help="default: as many ranks as the heads can split")
    add("--ring", type=at_least(1), help="default: the rest of the ranks")
    add("--attention", default="auto", help="kernel, as in the recipe")
    add("--mlp-tile", type=at_least(1), default=16384, help="rows of the MLP at a time")
    add("--seed", type=int, default=42)
    add("--limit-seconds", type=float, default=570.0, help="of the whole command")
    add("--out", required=True, help="JSON file")


def _add_prefill(add: Any) -> None:
    _add_common(add)
    add("--preset", help="named arguments, see benchmark/presets.py")
    add("--decode", type=at_least(1), default=32, help="tokens after the prompt")
    add("--prefill-chunk", type=at_least(1), help="tokens of the prompt at a time; default: all")


def _add_layout(add: Any) -> None:
    _add_common(add)
    add("--keep", choices=("device", "host", "none"), default="device", help="none: no recomputation at all")
    add("--rows", type=share, default=1.0, help="share of rows whose attention output is kept")
    add(
        "--device-layers",
        type=at_least(0),
        default=0,
        help="with --keep host: so many of the last layers keep on the device",
    )
    add("--loss-tile", type=at_least(1), default=2048, help="rows of logits at a time")
    add("--offload-optimizer", action="store_true")


def _add_checkpoint(add: Any) -> None:
    _add_layout(add)
    add("--target", required=True, help="folder of the checkpoints, local or s3://")
    add("--snapshot", choices=("memory", "disk", "none"), default="memory", help="what the loop waits for")
    add("--local", help="folder on the own disk, for --snapshot disk")
    add("--every", type=at_least(1), default=1, help="steps between checkpoints")
    add("--steps", type=at_least(1), default=4, help="steps with checkpoints; as many before and after without")
    add("--warmup", type=at_least(0), default=1)


def _add_train(add: Any) -> None:
    _add_layout(add)
    add("--preset", help="named arguments, see benchmark/presets.py")
    add("--also", action="append", default=[], metavar="FIELD=VALUE,...", help="one more run of ours, so changed")
    add("--steps", type=at_least(1), default=3)
    add("--warmup", type=at_least(0), default=1)
    add(
        "--warmup-length",
        type=at_least(1),
        help="tokens of a warm-up step, enough to compile; default: those of the others",
    )
    add("--peers", default="", help="alst, torch_cp, ring_flash_attn; separated by commas")
    add("--peer-layers", type=at_least(1), help="depth of the peers' model where theirs would not fit or last too long")
    add("--peer-attention", default="auto", help="transformers' name of the attention under ALST")
    add("--profile", action="store_true", help="one traced step more: where the GPU's time went")
    add(
        "--ranks-per-gpu",
        type=at_least(1),
        default=1,
        help="more than one: degrees beyond the GPUs at hand, with --compare-degrees or --long, for results alone",
    )
    add("--compare-degrees", metavar="UxR,...", help="compare loss and gradients between degrees")
    add("--long", type=at_least(1), metavar="TOKENS", help="one layer of this length against a float32 reference")
    add("--check-rows", type=at_least(1), default=DEFAULT_CHECK_ROWS, help="with --long: rows that have targets")


def prefill_of(options: argparse.Namespace) -> Prefill:
    """Raises UserError for a shape or degrees that there are not."""
    ulysses, ring = _degrees(options)
    return Prefill(
        shape=options.shape,
        layers=options.layers or _shape(options)["num_hidden_layers"],
        length=options.length,
        decode=options.decode,
        num_gpus=options.gpus,
        device=options.device,
        ulysses=ulysses,
        ring=ring,
        chunk=options.length if options.prefill_chunk is None else options.prefill_chunk,
        attention=options.attention,
        mlp_tile=options.mlp_tile,
        seed=options.seed,
        limit_seconds=options.limit_seconds,
        began=time.time(),
    )


def checkpoints_of(options: argparse.Namespace) -> Checkpoints:
    """Raises UserError for a shape or degrees that there are not, a snapshot without its folder, no checkpoint."""
    if options.snapshot == "disk" and options.local is None:
        raise UserError("--snapshot disk needs --local, a folder on the own disk")
    if options.every > options.steps:
        raise UserError(f"--every {options.every} is above --steps {options.steps}: no checkpoint would be written")
    layers = options.layers or _shape(options)["num_hidden_layers"]
    benchmark = Benchmark(
        shape=options.shape,
        num_gpus=options.gpus,
        device=options.device,
        setups=(_setup(options, options.length, layers),),
        steps=options.steps,
        warmup=options.warmup,
        seed=options.seed,
        limit_seconds=options.limit_seconds,
    )
    target = Location.of(options.target)
    return Checkpoints(benchmark, target, options.local, options.snapshot, options.every, "", time.time())


def _setup(options: argparse.Namespace, length: int, layers: int) -> Setup:
    ulysses, ring = _degrees(options)
    return Setup(
        length=length,
        layers=layers,
        ulysses=ulysses,
        ring=ring,
        keep=options.keep,
        rows=options.rows,
        device_layers=options.device_layers,
        attention=options.attention,
        mlp_tile=options.mlp_tile,
        loss_tile=options.loss_tile,
        offload_optimizer=options.offload_optimizer,
    )


def benchmark_of(options: argparse.Namespace) -> Benchmark:
    """Raises UserError for a shape, a field or degrees that there are not."""
    layers = options.layers or (1 if options.long else _shape(options)["num_hidden_layers"])
    base = _setup(options, options.long or options.length, layers)
    setups = (base, *(base.changed(text) for text in options.also))
    if options.compare_degrees:
        setups = tuple(base.changed(f"degrees={degrees}") for degrees in options.compare_degrees.split(","))
    return Benchmark(
        shape=options.shape,
        num_gpus=options.gpus,
        device=options.device,
        setups=setups,
        peers=tuple(name for name in options.peers.split(",") if name),
        peer_layers=options.peer_layers,
        peer_attention=options.peer_attention,
        steps=options.steps,
        warmup=options.warmup,
        warmup_length=options.warmup_length,
        seed=options.seed,
        ranks_per_gpu=options.ranks_per_gpu,
        profile=options.profile,
        compare_gradients=bool(options.compare_degrees),
        check_rows=options.check_rows if options.long else 0,
        limit_seconds=options.limit_seconds,
    )


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    if options.shape not in SHAPES:
        raise UserError(f"--shape {options.shape}: no such shape; there are {', '.join(SHAPES)}")
    return SHAPES[options.shape]


def _degrees(options: argparse.Namespace) -> tuple[int, int]:
    ranks = options.gpus * getattr(options, "ranks_per_gpu", 1)
    if options.ulysses or options.ring:
        ulysses = options.ulysses or max(1, ranks // options.ring)
        return ulysses, options.ring or max(1, ranks // ulysses)
    heads = model_heads(_shape(options))
    divisors = (degree for degree in range(ranks, 0, -1) if ranks % degree == 0)
    ulysses = next(degree for degree in divisors if heads_can_split(*heads, degree))
    return ulysses, ranks // ulysses
