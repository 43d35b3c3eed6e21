"""Loads a Hugging Face checkpoint into sharded parameters, reading only what each device holds."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase

import jax
import numpy as np

from moejax.checkpoint.pieces import Piece, Plan, Window, extents, hull, whole, within, within_source
from moejax.checkpoint.safetensors import DTYPES, ENCODED, CheckpointFiles, unsupported
from moejax.config import ModelConfig
from moejax.errors import MoejaxError

# One read: large enough to make system calls cheap, small enough to stay in a core's cache while it is cast and
# transposed.
_BLOCK_BYTES = 1 << 20
# Rows transposed at once; more of them, a power-of-two apart, evict each other from the first-level cache.
_TRANSPOSED_ROWS = 16
# Reading, casting and transposing run without the interpreter's lock.
_THREADS = 8
# XLA:CPU adopts a host buffer with this alignment as the array's own memory instead of copying it.
_ALIGNMENT = 64


def settle_tied_head(
    config: ModelConfig, names: Mapping[str, str], files: CheckpointFiles
) -> tuple[ModelConfig, CheckpointFiles]:
    """What tied embeddings mean for this checkpoint, as transformers decides it.

    With `tie_word_embeddings`, a checkpoint that holds both the embedding and an equal head is tied; one that holds
    both with different values is not, whatever its config says; one that holds only the head uses it for both.

    Source: transformers 5.23, `PreTrainedModel.tie_weights`.

    Returns:
        The config with `tie_word_embeddings` settled, and the files with one tensor for a tied pair, named as the
        embedding.
    """
    embed, head = names["embed"], names["lm_head"]
    if not config.tie_word_embeddings or head not in files.tensors:
        return config, files
    if embed in files.tensors and not _equal(files, embed, head):
        return replace(config, tie_word_embeddings=False), files
    tensors = {name: info for name, info in files.tensors.items() if name != head}
    tensors.setdefault(embed, files.tensors[head])
    return config, CheckpointFiles(files.folder, tensors)


def _equal(files: CheckpointFiles, a: str, b: str) -> bool:
    if files.tensors[a].shape != files.tensors[b].shape:
        return False
    blocks = _blocks(files, a, whole(files.tensors[a].shape))
    return all(np.array_equal(files.read(a, block), files.read(b, block)) for block in blocks)


def check(plan: Plan, files: CheckpointFiles, ignored: Sequence[str] = ()) -> None:
    """Checks that the files hold exactly the tensors of the plan, each with its shape and a dtype that can be read.

    Args:
        plan: what the model needs.
        files: the checkpoint.
        ignored: glob patterns of tensors that carry no parameter.

    Raises:
        MoejaxError: tensors missing, unknown or of another shape (one message for all of them), or an unsupported
            dtype.
    """
    missing = [name for name in plan.shapes if name not in files.tensors]
    # Empty tensors hold nothing: transformers writes shared experts of width 0 where a config has none of them.
    unknown = [
        name
        for name, info in files.tensors.items()
        if name not in plan.shapes and not _matches(name, ignored) and math.prod(info.shape)
    ]
    misshaped = [
        f"{name} is {_shape(files.tensors[name].shape)} and should be {_shape(shape)}"
        for name, shape in plan.shapes.items()
        if name in files.tensors and files.tensors[name].shape != shape
    ]
    faults = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for kind, found in (("missing", missing), ("unknown", unknown), ("of another shape", misshaped))
        if found
    ]
    if faults:
        hint = _hint(plan, files, missing, unknown)
        raise MoejaxError(f"the tensors in {files.folder} do not fit its config.json: {'; '.join(faults)}; {hint}")
    for name in plan.shapes:
        if files.tensors[name].dtype not in (("U8",) if name in plan.packed else DTYPES):
            raise MoejaxError(unsupported(name, files.tensors[name]))


def load_parameters(
    files: CheckpointFiles,
    plan: Plan,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """Fills every parameter from the checkpoint, one shard after another.

    Only the shards of this process's devices are read, each distinct one once, in small blocks that are cast and
    transposed into the shard's buffer. So the host needs the memory of one shard beyond what the devices hold; on CPU
    the devices take the buffers over and it needs none.

    Args:
        files: the checkpoint, which `check` found to fit the plan.
        plan: what the model needs.
        abstract: role -> shape, dtype and NamedSharding of the parameter.
        progress: called with (bytes of parameters loaded, bytes in all) after each shard; replicas count once.

    Raises:
        MoejaxError: a file that ends early, or a value beyond float16's range when that is the parameters' dtype.
    """
    shards = {role: _distinct_shards(parameter) for role, parameter in abstract.items()}
    total = sum(_bytes(abstract[role], window) for role, windows in shards.items() for window in windows)
    loaded, parameters = 0, {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for role, parameter in abstract.items():
            on_device: dict[jax.Device, jax.Array] = {}
            for window, devices in shards[role].items():
                buffer = _zeros(extents(_slices(window)), parameter.dtype)
                _fill(buffer, _slices(window), plan.pieces[role], files, pool)
                on_device |= {device: jax.device_put(buffer, device) for device in devices}
                # Where the transfer copies, the buffer goes before the next shard's comes. It is never written again:
                # on CPU it may be the array's memory.
                jax.block_until_ready([on_device[device] for device in devices])
                del buffer
                loaded += _bytes(parameter, window)
                if progress:
                    progress(loaded, total)
            order = parameter.sharding.addressable_devices_indices_map(parameter.shape)
            parameters[role] = jax.make_array_from_single_device_arrays(
                parameter.shape, parameter.sharding, [on_device[device] for device in order]
            )
    return parameters


def _distinct_shards(parameter: jax.ShapeDtypeStruct) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """The windows, as hashable (start, stop) pairs, that this process's devices hold, and who holds each."""
    shards = defaultdict(list)
    for device, index in parameter.sharding.addressable_devices_indices_map(parameter.shape).items():
        assert index is not None
        window = tuple(part.indices(extent)[:2] for part, extent in zip(index, parameter.shape, strict=True))
        shards[window].append(device)
    return shards


def _slices(window: tuple[tuple[int, int], ...]) -> Window:
    return tuple(slice(start, stop) for start, stop in window)


def _bytes(parameter: jax.ShapeDtypeStruct, window: tuple[tuple[int, int], ...]) -> int:
    return math.prod(stop - start for start, stop in window) * parameter.dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Aligned zeros; pages that padding never touches take no memory."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(
    buffer: np.ndarray, window: Window, pieces: Iterable[Piece], files: CheckpointFiles, pool: ThreadPoolExecutor
) -> None:
    """Writes a parameter's window into its buffer. What several pieces need of one tensor is read together."""
    by_tensor: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if part := within(piece, window):
            by_tensor[part.tensor].append(part)

    def move(tensor: str, block: Window) -> None:
        data = cast(files.read(tensor, block), buffer.dtype, tensor)
        for part in by_tensor[tensor]:
            if inside := within_source(part, block):
                _place(buffer, inside, data)

    moves = [
        pool.submit(move, tensor, block)
        for tensor, parts in by_tensor.items()
        for region in _regions([part.source for part in parts])
        for block in _blocks(files, tensor, region)
    ]
    for done in moves:
        done.result()


def _regions(sources: list[Window]) -> list[Window]:
    """What to read for several parts of one tensor: their hull, or each by itself where the hull is mostly others'."""
    together = hull(sources)
    if math.prod(extents(together)) <= 2 * sum(math.prod(extents(source)) for source in sources):
        return [together]
    return [hull([source]) for source in sources]


def _blocks(files: CheckpointFiles, tensor: str, region: Window) -> Iterator[Window]:
    """Cuts a region of a tensor into blocks of about _BLOCK_BYTES along the outermost axis that is longer than 1."""
    shape = extents(region)
    axis = next((axis for axis in files.tensors[tensor].major if shape[axis] > 1), 0)
    row_bytes = math.prod(shape[axis + 1 :]) * (DTYPES | ENCODED)[files.tensors[tensor].dtype].itemsize
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(region[axis].start, region[axis].stop, rows):
        yield (*region[:axis], slice(start, min(start + rows, region[axis].stop)), *region[axis + 1 :])


def cast(data: np.ndarray, dtype: np.dtype, tensor: str) -> np.ndarray:
    """Values in another dtype.

    Raises:
        MoejaxError: one is beyond float16's range, when that is the dtype.
    """
    if data.dtype == dtype:
        return data
    with np.errstate(over="ignore"):
        converted = data.astype(dtype)
    if dtype == np.float16 and not np.isfinite(converted).all():
        raise MoejaxError(f"{tensor} has values beyond float16's range (65504); load it as bfloat16 or float32")
    return converted


def _place(buffer: np.ndarray, piece: Piece, data: np.ndarray) -> None:
    # As integers: numpy copies its own dtypes faster than bfloat16, and lets other threads run meanwhile.
    bits = np.dtype(f"u{buffer.itemsize}")
    region, target = data.view(bits)[piece.source], buffer.view(bits)[piece.dest]
    region = region.squeeze(piece.lost)
    if not piece.transpose:
        target[...] = region
        return
    for row in range(0, len(region), _TRANSPOSED_ROWS):
        target[:, row : row + _TRANSPOSED_ROWS] = region[row : row + _TRANSPOSED_ROWS].T


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _hint(plan: Plan, files: CheckpointFiles, missing: list[str], unknown: list[str]) -> str:
    """What most likely went wrong: names that differ from sound ones only in a number mean other counts."""

    def numberless(names: Iterable[str]) -> set[str]:
        return {re.sub(r"\d+", "*", name) for name in names}

    if numberless(unknown) & numberless(plan.shapes):
        return "the files hold more layers or experts than config.json says"
    if numberless(missing) & numberless(files.tensors):
        return "the files hold fewer layers or experts than config.json says, or are incomplete"
    return "are both files of the same model?"
