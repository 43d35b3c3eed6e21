"""Reads chosen regions of safetensors files, and nothing else of them.

The files are read by `os.preadv` and never mapped: mapped pages would count as this process's memory. The headers are
validated by the safetensors library; names, shapes and offsets come from them.
"""

import itertools
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moejax.checkpoint.pieces import Window
from moejax.errors import MoejaxError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Dtypes of values."""

ENCODED = {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Dtypes of quantised weights, which mean nothing without their scales; `quantized.dequantised` gives their values."""

Fetch: TypeAlias = Callable[["TensorInfo", Window], np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file: its dtype as safetensors spells it ("BF16"), and the byte offset of its data in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def major(self) -> tuple[int, ...]:
        """The axes as they lie in the file, the outermost first; cut along the first, regions stay contiguous."""
        return tuple(range(len(self.shape)))

    def read(self, region: Window, fetch: Fetch) -> np.ndarray:
        """The values of a region; `fetch` reads what is stored."""
        return fetch(self, region)


class CheckpointFiles:
    """The tensors of a checkpoint folder. Use as a context manager, or call `close`."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.tensors = tensors
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> "CheckpointFiles":
        """Finds model.safetensors, or else the index and its shards, and reads their headers.

        Files may be links to anywhere, as in the hub's cache; the names in an index must stay inside the folder.

        Raises:
            MoejaxError: no weights, a broken or escaping index, a missing or damaged file, or an index and shards
                that disagree.
        """
        if (folder / SINGLE).exists():
            return cls(folder, _read_header(folder / SINGLE))
        if (folder / INDEX).exists():
            return cls(folder, _read_shards(folder, _read_index(folder / INDEX)))
        raise MoejaxError(_no_weights(folder))

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, region: Window) -> np.ndarray:
        """A region of a tensor in the tensor's own dtype; slices have explicit start and stop, and may have a step.

        Only the region's own bytes are read, one call for each contiguous run of them; where the step is within a run,
        all of the run. Threads may read at once.

        Raises:
            MoejaxError: a dtype that moejax does not read, or a file that ends early.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES | ENCODED:
            raise MoejaxError(unsupported(name, info))
        return info.read(region, self._fetch)

    def _fetch(self, info: TensorInfo, region: Window) -> np.ndarray:
        dtype, indices = (DTYPES | ENCODED)[info.dtype], ranges(region)
        run, offsets = _runs(info.shape, indices)
        count = math.prod(run) * dtype.itemsize
        outer = tuple(map(len, indices[: len(indices) - len(run)]))
        data = np.empty(math.prod(outer) * count, np.uint8)
        view = data.data
        descriptor = self._descriptor(info.file)
        for number, offset in enumerate(offsets):
            target = view[number * count : (number + 1) * count]
            _read_exactly(descriptor, target, info.offset + offset * dtype.itemsize, info.file)
        steps = tuple(slice(None, None, index.step) for index in indices[len(outer) :])
        return data.view(dtype).reshape(outer + run)[..., *steps]

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


def unsupported(name: str, info: TensorInfo) -> str:
    """The message for a tensor of a dtype that moejax does not read."""
    return (
        f"tensor {name} in {info.file} is stored as {info.dtype}; moejax reads {', '.join(DTYPES)}: "
        "take the checkpoint's unquantised version"
    )


def ranges(region: Window) -> tuple[range, ...]:
    """The indices that a region selects along each axis."""
    return tuple(range(part.start, part.stop, part.step or 1) for part in region)


def _runs(shape: tuple[int, ...], indices: Sequence[range]) -> tuple[tuple[int, ...], Iterator[int]]:
    """The shape of the contiguous runs that hold a region, and where each starts, counted in elements.

    A run spans all that lies between its first and its last element; axes outside it are stepped through.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = len(shape) - 1
    while axis > 0 and indices[axis] == range(shape[axis]):
        axis -= 1
    if not shape:
        return (), iter([0])
    span = indices[axis][-1] + 1 - indices[axis].start if indices[axis] else 0
    outer = (
        range(index.start * stride, index.stop * stride, index.step * stride)
        for index, stride in zip(indices[:axis], strides, strict=False)
    )
    first = indices[axis].start * strides[axis]
    return (span, *shape[axis + 1 :]), (first + sum(corner) for corner in itertools.product(*outer))


def _read_exactly(descriptor: int, target: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            raise MoejaxError(
                f"{file} ended at byte {offset + done} while it was read: it changed since it was opened; load again"
            )
        done += count


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, "numpy"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise MoejaxError(_damaged(file, error)) from error
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _damaged(file: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read {file}: {error.strerror}"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return f"{file} is a git-lfs pointer and holds no weights; run `git lfs pull` in its folder"
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(stream.read(length)) if length < size else {}
            expected = (
                8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            expected = size
    if expected > size:
        return f"{file} is truncated: its header promises {expected} bytes and it has {size}; download it again"
    return f"{file} is not a sound safetensors file ({str(error).splitlines()[0]}); download it again"


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, MoejaxError):
            raise MoejaxError(f"{file} {error}; download it again") from error
        raise MoejaxError(
            f"{file} is not a safetensors index: a JSON object with a weight_map; download it again"
        ) from error
    sound = isinstance(weight_map, dict) and weight_map and all(isinstance(shard, str) for shard in weight_map.values())
    if not sound:
        raise MoejaxError(f"{file} has no usable weight_map (tensor name -> file name); download it again")
    for tensor, shard in weight_map.items():
        if PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).drive or ".." in PureWindowsPath(shard).parts:
            raise MoejaxError(
                f"{file} places tensor {tensor} outside the checkpoint's folder, in {shard!r}; "
                "do not trust this checkpoint"
            )
    return weight_map


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise MoejaxError(f"lists {key} twice")
        seen[key] = value
    return seen


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not file.exists():
            raise MoejaxError(f"{file} is missing, though {INDEX} lists it; download it")
        for name, info in _read_header(file).items():
            if name in tensors:
                raise MoejaxError(f"tensor {name} is in both {tensors[name].file} and {file}; one must go")
            if name not in weight_map:
                raise MoejaxError(f"tensor {name} is in {file} but not in {INDEX}; download both again")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != folder / shard:
            raise MoejaxError(
                f"{INDEX} places tensor {name} in {folder / shard}, which does not hold it; download both again"
            )
    return tensors


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; name the folder that holds {SINGLE}"
    names = sorted(entry.name for entry in folder.iterdir())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"{folder} has {others[0]} but neither {SINGLE} nor {INDEX}; download the index, which names the files"
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0]}), and moejax never unpickles; convert them: load them in "
            "transformers and call save_pretrained(folder), which writes safetensors"
        )
    return f"{folder} has no weights: neither {SINGLE} nor {INDEX}"
