"""Write a Hugging Face folder from a stream of named tensors, so that no process ever holds a whole model.

In go tensors by name (from a sharded checkpoint, say) and the folder whose config and tokenizer they belong to; out
comes a folder that `from_pretrained` loads: safetensors shards of at most 5 GB, their index, config, tokenizer.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from ultralong_ray.model.folder import INDEX_FILE, WEIGHTS_FILE, copy_tokenizer
from ultralong_ray.storage import Location, copy_file
from ultralong_ray.types import UserError

MAX_SHARD_BYTES = 5 * 10**9
TIED_TENSOR = "lm_head.weight"


def save_hf_folder(
    target: Location,
    source: Location,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `target`, local or remote, from `weights` and the config and tokenizer files of `source`.

    Floating tensors are cast to `dtype`, which config.json then names. `lm_head.weight` is left out where the config
    ties it to the embeddings. The index, or the only shard, is written last.

    Raises: UserError for a tensor that comes twice, holds a non-finite value, or when there is none at all.
    """
    config = (source / "config.json").read_json()
    tied = bool(config.get("tie_word_embeddings", False))
    shards = _Shards(target, max_shard_bytes)
    for name, tensor in weights:
        if tied and name == TIED_TENSOR:
            continue
        # copy=True: a ZeRO-3 stream frees or reuses the tensor when the next one is asked for
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        if not bool(torch.isfinite(kept).all()):
            raise UserError(f"{target}: tensor {name} has values that are not finite; the checkpoint is not usable")
        shards.add(name, kept)
    config.pop("torch_dtype", None)
    (target / "config.json").write_json(config | {"dtype": str(dtype).removeprefix("torch.")})
    if (source / "generation_config.json").exists():
        copy_file(source / "generation_config.json", target / "generation_config.json")
    copy_tokenizer(source, target)
    shards.finish()


@dataclass
class _Shards:
    """Collects tensors and writes a file whenever the next one would not fit."""

    target: Location
    max_bytes: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    pending_bytes: int = 0
    total_bytes: int = 0
    num_files: int = 0
    file_of: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.pending or name in self.file_of:
            raise UserError(f"{self.target}: tensor {name} came twice; the checkpoint is not one model")
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
            # The number of files is not known yet, so names lack the usual "-of-N"; readers follow the index.
            self._flush(f"model-{self.num_files + 1:05d}.safetensors")
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes

    def finish(self) -> None:
        if not self.pending:
            raise UserError(f"{self.target}: no weights were given")
        if self.num_files == 0:
            self._flush(WEIGHTS_FILE)
            return
        self._flush(f"model-{self.num_files + 1:05d}.safetensors")
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.file_of}
        (self.target / INDEX_FILE).write_json(index)

    def _flush(self, name: str) -> None:
        # Beside the target where that is local: the system's temporary folder is often a small memory disk.
        beside = self.target.make_dir().path if self.target.is_local else None
        with tempfile.TemporaryDirectory(dir=beside) as scratch:
            path = Path(scratch) / name
            save_file(self.pending, path, metadata={"format": "pt"})
            with (self.target / name).open_for_write() as sink, path.open("rb") as written:
                shutil.copyfileobj(written, sink, length=2**24)
        self.file_of |= dict.fromkeys(self.pending, name)
        self.total_bytes += self.pending_bytes
        self.num_files += 1
        self.pending, self.pending_bytes = {}, 0
