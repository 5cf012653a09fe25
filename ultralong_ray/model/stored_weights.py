"""Whether the stored tensors of a folder are those of the model that its config.json describes.

Told from the file headers and from a model without memory, so that no GPU is asked for first. Values are read only
where one parameter is stored under two names. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ultralong_ray.model.folder import tensor_shapes, weight_files
from ultralong_ray.types import UserError

# Old releases of transformers stored RoPE's frequencies for every layer. The model makes its own, which are stretched.
STORED_FREQUENCIES = ".rotary_emb.inv_freq"


def check_weights(folder: Path, full: Any) -> int:
    """Refuse tensors that are missing, unknown, of another shape, or two where `full` (transformers' config) has one.

    Returns: parameters of the model. Raises: UserError.
    """
    stored = {name: shape for name, shape in tensor_shapes(folder).items() if not name.endswith(STORED_FREQUENCIES)}
    names_of = _parameters(full)
    expected = {name: shape for names, shape in names_of for name in names}
    wrong = [f"{name} is stored and unknown to it" for name in stored.keys() - expected.keys()]
    wrong += [f"{names[0]} is not stored" for names, _ in names_of if not stored.keys() & set(names)]
    wrong += [
        f"{name} is {list(shape)}, it has {list(expected[name])}"
        for name, shape in stored.items()
        if name in expected and shape != expected[name]
    ]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} stored tensors are not those of the model that config.json describes: "
            f"{'; '.join(sorted(wrong)[:3])}; fetch the model again, or mend its config.json"
        )
    for names, _ in names_of:
        _check_tied(folder, [name for name in names if name in stored])
    return sum(math.prod(shape) for _, shape in names_of)


def _parameters(full: Any) -> list[tuple[list[str], tuple[int, ...]]]:
    """(all names, shape) of every parameter: a tied head is another name of the embedding."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(full, attn_implementation="eager")
    found: dict[int, tuple[list[str], tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], tuple(parameter.shape)))[0].append(name)
    return list(found.values())


def _check_tied(folder: Path, names: list[str]) -> None:
    """transformers keeps both where they differ; training has one, so one of them would be lost."""
    if len(names) < 2:
        return
    import torch
    from safetensors import safe_open

    tensors = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as source:
            tensors |= {name: source.get_tensor(name) for name in names if name in source.keys()}  # noqa: SIM118
    first, *others = names
    for name in others:
        if not torch.equal(tensors[first], tensors[name]):
            raise UserError(
                f"{folder}: {name} differs from {first}, but config.json says tie_word_embeddings true: one of them "
                f"would be lost; set it to false there, or take {name} out of the files"
            )
