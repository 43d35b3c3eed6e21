"""Writes sharded parameters as a Hugging Face checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint.pieces import Piece, Plan, Window, extents, within
from moejax.checkpoint.writing import SHARD_BYTES, SPELLINGS, Stored, occupied, with_dtype, write_folder
from moejax.errors import MoejaxError

# Roles that share a tensor are of one layer, so they stand near each other.
_BUNDLE_REACH = 16


def save_checkpoint(
    parameters: Mapping[str, jax.Array],
    plan: Plan,
    config: Mapping[str, Any],
    extra_files: Sequence[Path],
    folder: Path,
    dtypes: Mapping[str, str] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters, config.json and other files into a new folder that transformers loads.

    Padding is dropped and repeated key/value heads are written once, so the files do not depend on the mesh. An
    interrupted save leaves nothing under the folder's name. The host holds one parameter at a time (or those that share
    a tensor), and one tensor. With several processes all must call this; each parameter in turn is gathered onto every
    device, and process 0 writes.

    Args:
        parameters: role -> array; asked for one after another.
        plan: where each parameter belongs in the checkpoint.
        config: config.json as it was read; its dtype is brought up to date in the spelling that it uses.
        extra_files: files to copy, such as tokenizer.json.
        folder: must not exist, or be empty.
        dtypes: role -> "float32", "bfloat16" or "float16"; None keeps each parameter's own.
        max_shard_bytes: as `write_folder` means it.

    Raises:
        MoejaxError: the folder holds something, or cannot be written, or a value is beyond float16. Every process
            raises.
    """
    writes = jax.process_index() == 0
    _agree(occupied(folder) if writes else "", folder)
    stored = _stored(plan, dtypes or {role: parameters[role].dtype.name for role in plan.pieces})
    tensors = _tensors(parameters, plan, stored)
    fault = ""
    if writes:
        documents = {"config.json": _updated(config, plan, stored)}
        try:
            write_folder(folder, stored, tensors, documents, extra_files, max_shard_bytes)
        except MoejaxError as error:
            fault = str(error)
    if jax.process_count() > 1:
        # The other processes, and a writer that gave up, still take part in the gathers that remain.
        for _ in tensors:
            pass
    _agree(fault, folder)


def _agree(fault: str, folder: Path) -> None:
    """Raises on every process when process 0 has a fault to report. All processes meet here."""
    failed = bool(fault)
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise MoejaxError(fault or f"process 0 could not write {folder}; its message says why")


def _stored(plan: Plan, dtypes: Mapping[str, str]) -> dict[str, Stored]:
    """All tensors in the order of writing: those of one parameter together."""
    return {
        piece.tensor: Stored(plan.shapes[piece.tensor], SPELLINGS[dtypes[role]])
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


def _updated(config: Mapping[str, Any], plan: Plan, stored: Mapping[str, Stored]) -> dict[str, Any]:
    updated = with_dtype(config, next(iter(stored.values())).dtype.name)
    if config.get("tie_word_embeddings") and "lm_head" in plan.pieces:
        updated["tie_word_embeddings"] = False
    return updated


def _tensors(parameters: Mapping[str, jax.Array], plan: Plan, stored: Mapping[str, Stored]) -> Iterator[np.ndarray]:
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
            data = np.empty(stored[tensor].shape, stored[tensor].dtype)
            # Of a key/value head that is stored several times the first copy counts, so it is written last.
            for role, part in reversed(parts):
                _collect(data, part, shards[role])
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise MoejaxError(f"{tensor} has values beyond float16's range (65504); save bfloat16 or float32")
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
            with np.errstate(over="ignore"):
                tensor[part.source] = region.reshape(extents(part.source)).astype(tensor.dtype)
