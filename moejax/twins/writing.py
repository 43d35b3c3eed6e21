"""Writes a checkpoint of random weights for a config, as the hub has it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from moejax.checkpoint.safetensors import DTYPES
from moejax.checkpoint.writing import Stored, occupied, with_dtype, write_folder
from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families import Family, family_of, read_config, text_config
from moejax.opening import checkpoint_plan
from moejax.twins.packing import packed
from moejax.twins.weights import tensor_values

NAMED = {dtype.name: dtype for dtype in DTYPES.values()}

# A twin is made whole in memory. A config that leaves sizes to its family makes a large one.
_MOST_PARAMETERS = 20_000_000

# Stand for the towers of other modalities, which the text model leaves out.
_OTHERS = {"vision_tower.patch_embedding.weight": (4, 3), "vision_tower.post_layernorm.weight": (4,)}


@dataclass(frozen=True)
class Written:
    """What was written: the folder, and the text model's parameters and bytes."""

    folder: Path
    config: ModelConfig
    parameters: int
    bytes: int


def write_checkpoint(
    folder: Path, raw: Mapping[str, Any], seed: int = 0, dtype: str = "float32", limit: int = _MOST_PARAMETERS
) -> Written:
    """Writes config.json, generation_config.json and model.safetensors.

    A model of several modalities gets its text tensors under its own names for them, and two more that stand for the
    parts which the text model leaves out. There are no layers of multi-token prediction.

    Args:
        folder: must not exist, or be empty.
        raw: parsed config.json; written with the dtype brought up to date.
        seed: of the weights; see `tensor_values`.
        dtype: "float32", "bfloat16" or "float16".
        limit: the most parameters.

    Raises:
        MoejaxError: an unsupported config, more parameters than `limit`, or a folder that holds something or cannot be
            written.
    """
    if fault := occupied(folder):
        raise MoejaxError(fault)
    config, family = read_config(raw), family_of(raw.get("model_type"))
    plan = checkpoint_plan(config, AbstractMesh((1, 1), ("ep", "tp")))
    parameters = sum(math.prod(shape) for shape in plan.shapes.values())
    if parameters > limit:
        raise MoejaxError(
            f"a model of this config would have {parameters:,} parameters, over {limit:,}; state the sizes that "
            "config.json leaves to the family"
        )
    text = text_config(raw)
    tensors = {name: value.astype(NAMED[dtype]) for name, value in tensor_values(config, plan, seed).items()}
    tensors = packed(tensors, plan, text.get("quantization_config"))
    size = sum(tensor.nbytes for tensor in tensors.values())
    if text is not raw:
        tensors = _wrapped(tensors, family) | {name: np.ones(shape, NAMED[dtype]) for name, shape in _OTHERS.items()}
    stored = {name: Stored.of(tensor) for name, tensor in tensors.items()}
    documents = {"config.json": with_dtype(raw, dtype), "generation_config.json": _token_ids(raw)}
    write_folder(folder, stored, tensors.values(), documents)
    return Written(folder, config, parameters, size)


def _wrapped(tensors: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The text model's tensors under the wrapper's names."""
    assert family.wrapper is not None
    outer = [(own, prefix) for prefix, own in family.wrapper.prefixes]
    renamed = {}
    for name, tensor in tensors.items():
        own, prefix = next((own, prefix) for own, prefix in outer if name.startswith(own))
        renamed[prefix + name.removeprefix(own)] = tensor
    return renamed


def _token_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    text = text_config(raw)
    return {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(name) is not None}
