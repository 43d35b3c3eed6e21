"""A checkpoint of random weights for a config, of any size: written a tensor at a time."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from moejax.checkpoint.safetensors import DTYPES, SINGLE
from moejax.errors import MoejaxError
from moejax.families import read_config, text_config
from moejax.opening import checkpoint_plan

_BLOCK = 1 << 22
"""Values drawn at once, so that memory does not grow with a tensor."""


def write_random_checkpoint(
    folder: Path, raw: Mapping[str, Any], dtype: str = "auto", progress: Callable[[int, int], None] | None = None
) -> Path:
    """Writes config.json and model.safetensors, and returns the folder.

    Matrices are normal with the standard deviation 1 / sqrt(last dimension), everything of one dimension is 1. Weights
    that the config would have quantised are written plain, in `dtype`.

    Args:
      folder: exists and is empty.
      raw: parsed config.json; of a model of several modalities the text part is written.
      dtype: "auto" is the config's.
      progress: called with (bytes written, bytes in all).

    Raises:
      MoejaxError: an unsupported config, or a folder that cannot be written.
    """
    text = {name: value for name, value in text_config(raw).items() if name != "quantization_config"}
    config = read_config(text)
    name = config.dtype if dtype == "auto" else dtype
    shapes = checkpoint_plan(config, AbstractMesh((1, 1), ("ep", "tp"))).shapes
    spelling = "torch_dtype" if "torch_dtype" in text else "dtype"
    try:
        (folder / "config.json").write_text(json.dumps(text | {spelling: name}, indent=2) + "\n", encoding="utf-8")
        _write_tensors(folder / SINGLE, shapes, name, progress)
    except OSError as error:
        raise MoejaxError(f"cannot write random weights to {folder}: {error.strerror}") from error
    return folder


def _write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, progress: Callable[[int, int], None] | None
) -> None:
    spelled, dtype = next((spelled, dtype) for spelled, dtype in DTYPES.items() if dtype.name == name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": spelled, "shape": shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = np.random.Generator(np.random.SFC64(0))
    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                count = min(left, _BLOCK)
                file.write(_values(generator, shape, count).astype(dtype).tobytes())
                left, done = left - count, done + count * dtype.itemsize
                if progress:
                    progress(done, end)


def _values(generator: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(count, np.float32)
    return generator.standard_normal(count, np.float32) / np.float32(math.sqrt(shape[-1]))
