"""What a benchmark runs: model shapes, one contestant's layout, and the whole of a command. Plain data, picklable.

Flows in: fields from the command line. Flows out: `Setup` and `Benchmark`, which every worker process is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ultralong_ray.config.degrees import heads_can_split, length_objection, model_heads
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 512.0,  # the 4M recipe's, so that one model serves every length
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# config.json of each shape; `--layers` replaces the depth. llama31_8b: meta-llama/Llama-3.1-8B, llama32_1b:
# meta-llama/Llama-3.2-1B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama31_8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4194304,
        "tie_word_embeddings": False,
        "rope_parameters": _LLAMA3_ROPE,
        "rotary_angles": "exact",
    },
    "llama32_1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4194304,
        "tie_word_embeddings": True,
        "rope_parameters": _LLAMA3_ROPE,
        "rotary_angles": "exact",
    },
    # The quickstart's model (jobs/models/tiny-512) with its window of 4096.
    "quickstart": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 2048,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            **_LLAMA3_ROPE,
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 512,
        },
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 97,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4194304,
        "tie_word_embeddings": False,
        # Large, so that attention and positions matter to the loss.
        "initializer_range": 0.2,
        "rope_parameters": {**_LLAMA3_ROPE, "original_max_position_embeddings": 64},
        "rotary_angles": "exact",
    },
}
PEERS = ("alst", "torch_cp", "ring_flash_attn")
LEARNING_RATE = 1e-5


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to train the shape. `keep*` and tiles are those of TrainPlan; peers use length and layers alone."""

    length: int  # tokens of a sequence
    layers: int
    ulysses: int
    ring: int
    keep: Literal["device", "host", "none"] = "device"
    """Where inputs and attention outputs wait; none: autograd keeps all."""
    rows: float = 1.0
    device_layers: int = 0
    """With keep = "host": so many of the last layers keep on the device all the same."""
    attention: str = "auto"
    mlp_tile: int = 16384
    loss_tile: int = 2048
    offload_optimizer: bool = False

    @property
    def plan(self) -> TrainPlan:
        keep: tuple[LayerKeep, ...] = ()
        if self.keep != "none":
            keep = (LayerKeep(self.keep, self.keep, self.rows),) * (self.layers - self.device_layers)
            keep += (LayerKeep(attention_rows=self.rows),) * self.device_layers
        return TrainPlan(
            ulysses_degree=self.ulysses,
            ring_degree=self.ring,
            keep=keep,
            mlp_tile_tokens=self.mlp_tile,
            loss_tile_tokens=self.loss_tile,
            offload_optimizer=self.offload_optimizer,
        )

    def changed(self, text: str) -> Setup:
        """This setup with the fields of "length=65536,keep=host,degrees=2x2". UserError: unknown field or value."""
        changes: dict[str, Any] = {}
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            if name == "degrees":
                changes["ulysses"], changes["ring"] = parse_degrees(value)
            elif name in _PARSERS:
                changes[name] = _read(name, _PARSERS[name], value)
            else:
                raise UserError(f"{item!r}: no such field of a setup; there are degrees, {', '.join(_PARSERS)}")
        return dataclasses.replace(self, **changes)


def at_least(least: int) -> Callable[[str], int]:
    """Reads an integer, for argparse. What it returns raises ArgumentTypeError for anything below `least`."""
    what = "a positive integer" if least == 1 else f"an integer from {least} on"

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return read


def share(text: str) -> float:
    """As `at_least`, of a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1")


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(words)}")
        return text

    return read


_PARSERS: dict[str, Callable[[str], Any]] = {
    "length": at_least(1),
    "layers": at_least(1),
    "keep": _one_of("device", "host", "none"),
    "rows": share,
    "device_layers": at_least(0),
    "attention": str,
    "mlp_tile": at_least(1),
    "loss_tile": at_least(1),
    "offload_optimizer": lambda text: _one_of("true", "false")(text) == "true",
}


def parse_degrees(text: str) -> tuple[int, int]:
    """ "4x1" is Ulysses degree 4, ring degree 1. Raises UserError."""
    ulysses, _, ring = text.partition("x")
    return _read("ulysses", at_least(1), ulysses), _read("ring", at_least(1), ring)


def _read(name: str, parser: Callable[[str], Any], text: str) -> Any:
    try:
        return parser(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}={error}") from None


def refuse_heads(shape: str, ulysses: int) -> None:
    """Raise UserError where the heads of a shape cannot be split so."""
    heads, kv_heads = model_heads(SHAPES[shape])
    if not heads_can_split(heads, kv_heads, ulysses):
        raise UserError(
            f"Ulysses degree {ulysses} cannot split the {heads} query and {kv_heads} key-value heads of {shape}; give "
            f"the rest to the ring"
        )


def model_folder(given: str) -> Path:
    """The folder of `--model`. Raises UserError where no model is."""
    folder = Path(given).expanduser().resolve()
    if not (folder / "config.json").exists():
        raise UserError(f"--model {folder}: no config.json there; name a Hugging Face folder")
    return folder


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A whole command. `check_rows` > 0 compares with a float32 reference instead of timing several steps."""

    shape: str
    num_gpus: int
    device: Literal["cuda", "cpu"]
    setups: tuple[Setup, ...]  # ours, in the order in which they run
    peers: tuple[str, ...] = ()
    peer_layers: int | None = None
    peer_attention: str = "auto"
    steps: int = 3
    warmup: int = 1
    warmup_length: int | None = None  # tokens of a warm-up step of ours; None: those of the setup
    seed: int = 42
    ranks_per_gpu: int = 1  # more: degrees beyond the GPUs at hand, for their results; times mean nothing then
    profile: bool = False
    compare_gradients: bool = False
    check_rows: int = 0
    limit_seconds: float = 570.0

    @property
    def precision(self) -> Literal["bfloat16", "float32"]:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def num_ranks(self) -> int:
        return self.num_gpus * self.ranks_per_gpu

    def config(self, layers: int) -> dict[str, Any]:
        """The shape's config.json at a depth."""
        return {**SHAPES[self.shape], "num_hidden_layers": layers}

    @property
    def peer_setup(self) -> Setup:
        """What peers compute: the first setup's length, all GPUs on one sequence."""
        first = self.setups[0]
        return dataclasses.replace(first, layers=self.peer_layers or first.layers, ulysses=self.num_ranks, ring=1)

    def check(self) -> None:
        """Raise UserError for what cannot run, before any process is started."""
        if self.shape not in SHAPES:
            raise UserError(f"--shape {self.shape}: no such shape; there are {', '.join(SHAPES)}")
        unknown = set(self.peers) - set(PEERS)
        if unknown:
            raise UserError(f"--peers {', '.join(sorted(unknown))}: no such peer; there are {', '.join(PEERS)}")
        shared = f" x --ranks-per-gpu {self.ranks_per_gpu}" if self.ranks_per_gpu > 1 else ""
        if shared and (self.peers or not (self.compare_gradients or self.check_rows)):
            raise UserError(
                f"--ranks-per-gpu {self.ranks_per_gpu} is for --compare-degrees and --long without --peers: times of "
                "ranks that share a GPU mean nothing"
            )
        for setup in self.setups:
            degree = setup.ulysses * setup.ring
            if self.num_ranks % degree:
                raise UserError(f"degrees {setup.ulysses}x{setup.ring} do not divide --gpus {self.num_gpus}{shared}")
            refuse_heads(self.shape, setup.ulysses)
            for length in {setup.length, self.warmup_length or setup.length}:
                if objection := length_objection(length, setup.ulysses, setup.ring):
                    raise UserError(objection)
            if setup.device_layers > setup.layers:
                raise UserError(f"--device-layers {setup.device_layers}: the model has {setup.layers} layers")
        if self.warmup_length and (self.peers or self.compare_gradients):
            raise UserError("--warmup-length is for runs whose first loss is compared with no peer's and no other's")
        if self.check_rows and (self.setups[0].layers != 1 or self.setups[0].plan.degree != self.num_ranks):
            raise UserError("--long compares one layer of one sequence over all GPUs: give --layers 1 and all degrees")
        if self.compare_gradients and len({(s.length, s.layers, s.plan.degree) for s in self.setups}) > 1:
            raise UserError("gradients can be compared between setups of one length, depth and total degree only")
