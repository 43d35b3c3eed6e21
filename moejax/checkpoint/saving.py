"""Writes sharded parameters as a Hugging Face checkpoint."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint.pieces import Piece, Plan, Window, extents, within
from moejax.checkpoint.safetensors import DTYPES, ENCODED, INDEX, SINGLE
from moejax.errors import MoejaxError

_WRITTEN = DTYPES | ENCODED


class _Stored(NamedTuple):
    """What a tensor is in the files."""

    shape: tuple[int, ...]
    spelling: str

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _WRITTEN[self.spelling].itemsize


# Roles that share a tensor are of one layer, so they stand near each other.
_BUNDLE_REACH = 16

# The tensors of one file, in the order of their bytes.
_File = dict[str, _Stored]


def save_checkpoint(
    parameters: Mapping[str, jax.Array],
    plan: Plan,
    config: Mapping[str, Any],
    extra_files: Sequence[Path],
    folder: Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters, config.json and other files into a new folder that transformers loads.

    Padding is dropped and repeated key/value heads are written once, so the files do not depend on the mesh. They are
    written beside the folder and renamed at the end: an interrupted save leaves nothing under its name. The host holds
    one parameter at a time (or those that share a tensor), and one tensor. With several processes all must call this;
    each parameter in turn is gathered onto every device, and process 0 writes.

    Args:
        parameters: role -> array.
        plan: where each parameter belongs in the checkpoint.
        config: config.json as it was read; its dtype is brought up to date in the spelling that it uses.
        extra_files: files to copy, such as tokenizer.json.
        folder: must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16"; None keeps each parameter's own.
        max_shard_bytes: a file is closed before its tensors would exceed this; one larger tensor gets a file of its
            own.

    Raises:
        MoejaxError: the folder holds something, or cannot be written. Every process raises.
    """
    writes = jax.process_index() == 0
    _agree(_occupied(folder) if writes else "", folder)
    stored = _stored(parameters, plan, dtype)
    tensors = _tensors(parameters, plan, stored)
    fault = ""
    if writes:
        files, config = _files(stored, max_shard_bytes), _updated(config, plan, stored)
        fault = _write(folder, files, tensors, config, extra_files)
    if jax.process_count() > 1:
        # The other processes, and a writer that gave up, still take part in the gathers that remain.
        for _ in tensors:
            pass
    _agree(fault, folder)


def _occupied(folder: Path) -> str:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return ""
    return f"{folder} exists already; save into a new or empty folder, or remove it first"


def _agree(fault: str, folder: Path) -> None:
    """Raises on every process when process 0 has a fault to report. All processes meet here."""
    failed = bool(fault)
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise MoejaxError(fault or f"process 0 could not write {folder}; its message says why")


def _stored(parameters: Mapping[str, jax.Array], plan: Plan, dtype: str | None) -> _File:
    """All tensors in the order of writing: those of one parameter together."""
    spelling = {known.name: name for name, known in _WRITTEN.items()}
    return {
        piece.tensor: _Stored(plan.shapes[piece.tensor], spelling[dtype or parameters[role].dtype.name])
        for roles in _bundles(plan)
        for role in roles
        for piece in plan.pieces[role]
    }


def _bundles(plan: Plan) -> list[list[str]]:
    """Roles that share tensors, together; most stand alone."""
    bundles: list[tuple[set[str], list[str]]] = []
    for role, pieces in plan.pieces.items():
        tensors, roles = {piece.tensor for piece in pieces}, [role]
        for other in [bundle for bundle in bundles[-_BUNDLE_REACH:] if bundle[0] & tensors]:
            bundles.remove(other)
            tensors, roles = other[0] | tensors, other[1] + roles
        bundles.append((tensors, roles))
    return [roles for _, roles in bundles]


def _files(stored: _File, max_shard_bytes: int) -> dict[str, _File]:
    """File name -> its tensors."""
    files: list[_File] = [{}]
    for name, tensor in stored.items():
        if files[-1] and sum(other.size for other in files[-1].values()) + tensor.size > max_shard_bytes:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": file for number, file in enumerate(files, 1)}


def _updated(config: Mapping[str, Any], plan: Plan, stored: _File) -> dict[str, Any]:
    dtype = DTYPES[next(iter(stored.values())).spelling].name
    spellings = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    updated = dict(config) | {key: dtype for key in spellings}
    if config.get("tie_word_embeddings") and "lm_head" in plan.pieces:
        updated["tie_word_embeddings"] = False
    return updated


def _tensors(parameters: Mapping[str, jax.Array], plan: Plan, stored: _File) -> Iterator[np.ndarray]:
    """The checkpoint's tensors in the order of `stored`; processes other than 0 take part and get nothing."""
    for roles in _bundles(plan):
        gathered = {role: _gathered(parameters[role]) for role in roles}
        if jax.process_index() != 0:
            continue
        shards = {role: _distinct_shards(parameter) for role, parameter in gathered.items()}
        by_tensor: dict[str, list[tuple[str, Piece]]] = {}
        for role in roles:
            for piece in plan.pieces[role]:
                by_tensor.setdefault(piece.tensor, []).append((role, piece))
        for tensor, parts in by_tensor.items():
            data = np.empty(stored[tensor].shape, _WRITTEN[stored[tensor].spelling])
            # Of a key/value head that is stored several times the first copy counts, so it is written last.
            for role, part in reversed(parts):
                _collect(data, part, shards[role])
            yield data


def _gathered(parameter: jax.Array) -> jax.Array:
    """The parameter itself, or a replicated copy if other processes hold parts of it."""
    if parameter.is_fully_addressable:
        return parameter
    assert isinstance(parameter.sharding, NamedSharding)
    return jax.jit(_identity, out_shardings=NamedSharding(parameter.sharding.mesh, PartitionSpec()))(parameter)


def _identity(x: jax.Array) -> jax.Array:
    return x


def _distinct_shards(parameter: jax.Array) -> list[tuple[Window, np.ndarray]]:
    """The windows of a parameter and what they hold, on the host, replicas left out."""
    shards = {}
    for shard in parameter.addressable_shards:
        bounds = tuple(part.indices(extent)[:2] for part, extent in zip(shard.index, parameter.shape, strict=True))
        shards[bounds] = shard.data
    return [(tuple(slice(*pair) for pair in bounds), _on_host(data)) for bounds, data in shards.items()]


def _on_host(shard: jax.Array) -> np.ndarray:
    # An array keeps the host copy that it is asked for. Asking a second array over the same memory keeps the parameters
    # from holding the whole model on the host, once saved.
    return np.asarray(jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard]))


def _collect(tensor: np.ndarray, piece: Piece, shards: list[tuple[Window, np.ndarray]]) -> None:
    """Writes what the shards hold of one piece into its tensor."""
    for window, shard in shards:
        if part := within(piece, window):
            region = shard[part.dest].T if part.transpose else shard[part.dest]
            tensor[part.source] = region.reshape(extents(part.source)).astype(tensor.dtype)


def _write(
    folder: Path,
    files: Mapping[str, _File],
    tensors: Iterator[np.ndarray],
    config: Mapping[str, Any],
    extra_files: Sequence[Path],
) -> str:
    """Writes everything beside `folder`, then renames it. Returns what went wrong, or nothing."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name, file in files.items():
            _write_weights(partial / name, file, tensors)
        if len(files) > 1:
            size = sum(tensor.size for file in files.values() for tensor in file.values())
            weight_map = {tensor: name for name, file in files.items() for tensor in file}
            _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(partial / "config.json", config)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        partial.rename(folder)
    except OSError as error:
        return f"cannot write {folder}: {error.strerror}"
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ""


def _write_weights(path: Path, file: _File, tensors: Iterator[np.ndarray]) -> None:
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
