"""Writes a Hugging Face folder: tensors, one after another, into safetensors files, and what stands beside them."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.checkpoint.safetensors import DTYPES, ENCODED, INDEX, SINGLE
from moejax.errors import MoejaxError

SHARD_BYTES = 5_000_000_000
"""The largest weights file, unless a single tensor is larger."""

WRITTEN = DTYPES | ENCODED
SPELLINGS = {dtype.name: spelling for spelling, dtype in WRITTEN.items()}
"""The name of a numpy dtype -> how safetensors spells it."""


class Stored(NamedTuple):
    """What a tensor is in the files."""

    shape: tuple[int, ...]
    spelling: str

    @classmethod
    def of(cls, tensor: np.ndarray) -> "Stored":
        return cls(tensor.shape, SPELLINGS[tensor.dtype.name])

    @property
    def dtype(self) -> np.dtype:
        return WRITTEN[self.spelling]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# The tensors of one file, in the order of their bytes.
_File = dict[str, Stored]


def occupied(folder: Path) -> str:
    """The message for a folder that is there and not empty; nothing for one that may be written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    return f"{folder} exists already; save into a new or empty folder, or remove it first"


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with its dtype brought up to date, in the spelling and the places that it has."""
    result = dict(config)
    if isinstance(config.get("text_config"), Mapping):
        result["text_config"] = with_dtype(config["text_config"], dtype)
    spellings = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return result | dict.fromkeys(spellings, dtype)


def write_folder(
    folder: Path,
    stored: Mapping[str, Stored],
    tensors: Iterable[np.ndarray],
    documents: Mapping[str, Mapping[str, Any]],
    copied: Sequence[Path] = (),
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes everything beside `folder`, then renames it: what is interrupted leaves nothing under its name.

    Args:
        folder: must not exist, or be empty; see `occupied`.
        stored: every tensor by name, in the order of writing.
        tensors: what they hold, in that order; one is held at a time.
        documents: file name -> JSON object, such as config.json.
        copied: files to copy, such as tokenizer.json.
        max_shard_bytes: a file is closed before its tensors would exceed this; one larger tensor gets a file of its
            own.

    Raises:
        MoejaxError: the folder cannot be written.
    """
    files = _files(stored, max_shard_bytes)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    following = iter(tensors)
    try:
        partial.mkdir(parents=True)
        for name, file in files.items():
            _write_weights(partial / name, file, following)
        if len(files) > 1:
            size = sum(tensor.size for tensor in stored.values())
            weight_map = {tensor: name for name, file in files.items() for tensor in file}
            _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        for name, document in documents.items():
            _write_json(partial / name, document)
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        partial.rename(folder)
    except OSError as error:
        raise MoejaxError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(stored: Mapping[str, Stored], max_shard_bytes: int) -> dict[str, _File]:
    """File name -> its tensors."""
    files: list[_File] = [{}]
    size = 0
    for name, tensor in stored.items():
        if files[-1] and size + tensor.size > max_shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": file for number, file in enumerate(files, 1)}


def _write_weights(path: Path, file: _File, tensors: Iterator[np.ndarray]) -> None:
    """The safetensors library writes no float8 of numpy, and wants all tensors at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in file.items():
        header[name] = {"dtype": tensor.spelling, "shape": tensor.shape, "data_offsets": (offset, offset + tensor.size)}
        offset += tensor.size
    encoded = json.dumps(header).encode()
    # The format asks for data that start at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for _ in file:
            stream.write(next(tensors).reshape(-1).view(np.uint8).data)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
