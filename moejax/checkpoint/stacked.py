"""Stacked experts seen as tensors of their own.

Qwen3.5-MoE is published with all experts of a layer in one tensor, `gate_up_proj` [E, 2 F, D] and `down_proj`
[E, D, F], the form in which transformers holds any family's experts in memory. What transformers saves has three
tensors an expert, and its loader takes both; so does this.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moejax.checkpoint.safetensors import DTYPES, CheckpointFiles, TensorInfo

_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Roles of a stacked tensor's parts, in the order of its rows."""


def separated(files: CheckpointFiles, names: Mapping[str, str]) -> CheckpointFiles:
    """A view of the files in which each expert of a stacked tensor has its own; it reads the same bytes.

    Args:
        files: the checkpoint. The view has file descriptors of its own; close the view.
        names: of a family with separate experts. A stacked tensor's name is theirs up to the expert's number.
    """
    tensors = {}
    for name, info in files.tensors.items():
        tensors |= dict(_own_tensors(name, info, names)) or {name: info}
    return CheckpointFiles(files.folder, tensors)


def _own_tensors(name: str, info: TensorInfo, names: Mapping[str, str]) -> Iterator[tuple[str, TensorInfo]]:
    """Nothing where the tensor is no stack of experts."""
    parts = _PARTS.get(name.rpartition(".")[2], ())
    if not parts or len(info.shape) != 3 or info.shape[1] % len(parts) or info.dtype not in DTYPES:
        return
    templates = [names[f"layers.{{l}}.moe.{part}"] for part in parts]
    stem = re.escape(templates[0].partition(".{e}.")[0]).replace(r"\{l\}", r"(\d+)")
    layer = re.fullmatch(stem, name.rpartition(".")[0])
    if layer is None:
        return
    experts, rows, columns = info.shape[0], info.shape[1] // len(parts), info.shape[2]
    size = rows * columns * DTYPES[info.dtype].itemsize
    for number in range(experts * len(parts)):
        expert, part = divmod(number, len(parts))
        own = replace(info, shape=(rows, columns), offset=info.offset + number * size)
        yield templates[part].format(l=layer[1], e=expert), own
