"""A Hugging Face folder, or a seed, to a model ready for the engine.

Reads config.json and, for init = "pretrained", the safetensors shards. Only rank 0 reads weights, one shard at a time;
under ZeRO-3 no rank ever holds more than one whole tensor and its own part of the rest. (transformers' own ZeRO-3
loading needs accelerate and a local folder.) Read against transformers 5.23.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong_ray.config import TrainConfig
from ultralong_ray.model.angles import install_angles
from ultralong_ray.model.stored_weights import STORED_FREQUENCIES
from ultralong_ray.parallel.loss import LanguageModelLoss
from ultralong_ray.parallel.norm import install_fused_norms
from ultralong_ray.parallel.ulysses import ATTENTION_NAME, register_attention
from ultralong_ray.storage import Location
from ultralong_ray.train.activation_store import ActivationStore
from ultralong_ray.train.engine import gather_whole, partitioned, writable
from ultralong_ray.train.replay import install_replay
from ultralong_ray.types import TrainPlan, UserError


def build_model(
    folder: Location,
    random_seed: int | None,
    train: TrainConfig,
    plan: TrainPlan,
    config: dict[str, Any],
    device: torch.device,
) -> LanguageModelLoss:
    """The model of `folder`, its weights read from there, or drawn from `random_seed` where one is given.

    `plan` says what its layers keep (nothing said: autograd keeps all), `config` is DeepSpeed's. Collective: all ranks
    call it. Raises UserError when shards and config.json disagree, or for an MLP that cannot be replayed.
    """
    register_attention()
    shape = AutoConfig.for_model(**(folder / "config.json").read_json())
    # With a pad token the embedding would be made to ignore gradients of its row, and to index a partitioned weight.
    shape.pad_token_id = None
    dtype = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    with partitioned(config, device):
        causal_lm = AutoModelForCausalLM.from_config(shape, attn_implementation=ATTENTION_NAME, dtype=dtype)
    # zero.Init rounds every tensor made inside it to bfloat16, RoPE's frequencies too: at position 100,000 that turns
    # an angle by hundreds of radians. Made again outside, they are float32.
    causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config=shape).to(device)
    install_angles(causal_lm)
    if random_seed is None:
        _read_weights(causal_lm, folder)
    else:
        draw_weights(causal_lm, shape.initializer_range, random_seed, device)
    install_fused_norms(causal_lm)
    if plan.keep:
        install_replay(causal_lm, plan.keep, plan.mlp_tile_tokens, ActivationStore(device))
    for layer in causal_lm.model.layers:
        gather_whole(layer)
    causal_lm.train()
    return LanguageModelLoss(causal_lm, plan.loss_tile_tokens)


def draw_weights(causal_lm: nn.Module, std: float, seed: int, device: torch.device) -> None:
    """Llama's initialisation: matrices normal, norms 1, biases 0.

    Drawn in float32 on `device`, since a CPU takes minutes for 8 billion numbers: the same for every ZeRO stage and
    world size, but not the same on GPU and CPU. Collective.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in causal_lm.named_parameters():
        with writable(parameter) as writes:
            if writes:
                fill_drawn(parameter, name, std, generator)


@torch.no_grad()
def fill_drawn(parameter: nn.Parameter, name: str, std: float, generator: torch.Generator) -> None:
    """One whole parameter of a new model, drawn on the generator's device whatever device the parameter is on."""
    if parameter.dim() > 1:
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
        parameter.copy_(drawn.normal_(0.0, std, generator=generator))
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _read_weights(causal_lm: nn.Module, folder: Location) -> None:
    """Rank 0 reads, in the order of the shards; the names it will read next are told to the other ranks first."""
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    shards = [item for item in folder.files() if item.name.endswith(".safetensors")]
    if not shards:
        raise UserError(f"{folder} holds no .safetensors file; export or convert the model first")
    unread = {id(parameter) for parameter in parameters.values()}
    for shard in shards:
        with _opened(shard) if dist.get_rank() == 0 else contextlib.nullcontext() as source:
            names = [sorted(source.keys()) if source is not None else None]
            dist.broadcast_object_list(names, src=0)
            for name in names[0] or []:
                if name.endswith(STORED_FREQUENCIES):
                    continue
                if name not in parameters:
                    raise UserError(f"{shard}: tensor {name} is unknown to the model that config.json describes")
                tensor = source.get_tensor(name) if source is not None else None
                if id(parameters[name]) in unread:
                    unread.discard(id(parameters[name]))
                    _write(parameters[name], tensor, name, shard)
                else:  # a tied head that is stored once more
                    _compare(parameters[name], tensor, name, shard)
    missing = [name for name, parameter in parameters.items() if id(parameter) in unread]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors that config.json asks for, first {missing[0]}")


def _write(parameter: nn.Parameter, tensor: torch.Tensor | None, name: str, shard: Location) -> None:
    with writable(parameter), torch.no_grad():
        if tensor is None:
            return
        if tensor.shape != parameter.shape:
            raise UserError(f"{shard}: {name} is {list(tensor.shape)}, config.json makes it {list(parameter.shape)}")
        parameter.copy_(tensor)


def _compare(parameter: nn.Parameter, tensor: torch.Tensor | None, name: str, shard: Location) -> None:
    """One parameter under two names: what is stored under the second must be what was read under the first."""
    with writable(parameter), torch.no_grad():
        if tensor is not None and not torch.equal(parameter, tensor.to(parameter)):
            raise UserError(
                f"{shard}: {name} differs from what is stored for the same parameter under another name, but "
                f"config.json says tie_word_embeddings true: one of them would be lost; set it to false in the base's "
                f"config.json and run the extend stage again"
            )


@contextlib.contextmanager
def _opened(shard: Location) -> Iterator[Any]:
    """A shard as safetensors' lazy reader; a remote one is downloaded for as long as it is read."""
    if shard.is_local:
        with _whole(Path(shard.path), shard) as source:
            yield source
        return
    with tempfile.TemporaryDirectory() as cache:
        local = Path(cache) / shard.name
        with shard.filesystem.open_input_stream(shard.path, compression=None) as remote, local.open("wb") as target:
            while block := remote.read(2**24):
                target.write(block)
        with _whole(local, shard) as source:
            yield source


def _whole(file: Path, shard: Location) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{shard} is damaged or cut short ({error}); run the stage that wrote it again") from error
