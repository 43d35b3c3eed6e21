"""Weights from a Hugging Face folder into a run's layout and back, some hundred megabytes at a time."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint.experimental import v1

from moejax.checkpoint.huggingface import load_parameters
from moejax.checkpoint.pieces import Plan
from moejax.checkpoint.safetensors import DTYPES
from moejax.checkpoint.saving import save_checkpoint
from moejax.checkpoint.source import read_json
from moejax.checkpoint.writing import occupied
from moejax.errors import MoejaxError
from moejax.families import read_config
from moejax.language_model import role_of
from moejax.loading import COMPANIONS, abstract_decoder, dtype_of, plain_config
from moejax.opening import Checkpoint, checkpoint_plan
from moejax.run_checkpoints.neutral import PARAMETERS
from moejax.run_checkpoints.sealing import seal, told
from moejax.run_checkpoints.stored import STATE, StoredState

_GROUP_BYTES = 1 << 26
"""Parameters are saved so many at a time: each save writes files of its own."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What was written: parameters and bytes of the weights, and their dtype, or "mixed"."""

    parameters: int
    bytes: int
    dtype: str


def to_run(source: Path, target: Path, mesh: Mesh, progress: Progress | None = None) -> Converted:
    """Writes a folder as a run's, with the weights as checkpoint 0, beside its name first.

    Weights keep their dtype; quantised ones take the config's.

    Args:
      source: a Hugging Face folder.
      target: a new or empty folder.
      mesh: of one device, which the weights pass through.
      progress: called with (bytes read, bytes in all).

    Raises:
      MoejaxError: a model that is not supported, files that do not fit it, or a folder that cannot be written.
    """
    if fault := occupied(target):
        raise MoejaxError(fault)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial").absolute()
    try:
        with Checkpoint.open(source) as checkpoint:
            raw = plain_config(checkpoint.raw_config, checkpoint.config)
            (partial / "model").mkdir(parents=True)
            (partial / "model" / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
            for name in COMPANIONS:
                if (source / name).is_file():
                    shutil.copyfile(source / name, partial / "model" / name)
            wanted = _abstract(checkpoint, mesh)
            with told(f"cannot write {target}"):
                _write(partial / "checkpoints" / "0", checkpoint, wanted, checkpoint.plan(mesh), progress)
        partial.rename(target)
    except OSError as error:
        raise MoejaxError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _converted(list(wanted.values()))


def to_huggingface(
    checkpoint: Path, model: Path, target: Path, mesh: Mesh, dtype: str | None = None, progress: Progress | None = None
) -> Converted:
    """Writes a checkpoint's parameters as a Hugging Face folder that transformers loads.

    Args:
      checkpoint: of a run, such as run/checkpoints/300.
      model: the run's folder with config.json and the tokenizer.
      target: a new or empty folder.
      mesh: of one device, which the weights pass through.
      dtype: "float32", "bfloat16" or "float16"; None is the config's for a run's master weights, and of weights that
        `to_run` wrote their own.
      progress: called with (bytes read, bytes in all).

    Raises:
      MoejaxError: a damaged checkpoint, one of another model, or a folder that cannot be written.
    """
    raw = read_json(model, "config.json")
    config = read_config(raw)
    stored = StoredState.open(checkpoint)
    trained = any(not name.startswith(PARAMETERS) for name in stored.arrays)
    stored = replace(stored, arrays={n: leaf for n, leaf in stored.arrays.items() if n.startswith(PARAMETERS)})
    wanted = {}
    for path, leaf in abstract_decoder(config, mesh, np.float32)[1].items():
        name = PARAMETERS + role_of(path)
        own = stored.arrays[name].dtype if name in stored.arrays else leaf.dtype
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, own, sharding=leaf.sharding)
    stored.check(wanted)
    one = dtype or (config.dtype if trained else None)
    dtypes = {name.removeprefix(PARAMETERS): one or leaf.dtype.name for name, leaf in wanted.items()}
    companions = [model / name for name in COMPANIONS if (model / name).is_file()]
    parameters = _Unread(stored, wanted, progress)
    save_checkpoint(parameters, checkpoint_plan(config, mesh), raw, companions, target, dtypes)
    return _converted([jax.ShapeDtypeStruct(wanted[PARAMETERS + r].shape, np.dtype(d)) for r, d in dtypes.items()])


class _Unread(Mapping[str, jax.Array]):
    """Role -> parameter, read when it is asked for and then forgotten."""

    def __init__(self, stored: StoredState, wanted: Mapping[str, jax.ShapeDtypeStruct], progress: Progress | None):
        self._stored, self._wanted, self._progress = stored, wanted, progress
        self._done, self._total = 0, sum(map(_bytes, wanted.values()))

    def __getitem__(self, role: str) -> jax.Array:
        name = PARAMETERS + role
        array = self._stored.read({name: self._wanted[name]})[name]
        self._done += array.nbytes
        if self._progress:
            self._progress(self._done, self._total)
        return array

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(PARAMETERS) for name in self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


def _abstract(checkpoint: Checkpoint, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Role -> parameter, in the dtype that the files have for it."""
    layout = checkpoint.plan(mesh)
    quantised = "quantization_config" in checkpoint.raw_config
    wanted = {}
    for path, leaf in abstract_decoder(checkpoint.config, mesh, dtype_of("auto", checkpoint.config))[1].items():
        role = role_of(path)
        stored = {DTYPES[checkpoint.files.tensors[piece.tensor].dtype] for piece in layout.pieces[role]}
        own = leaf.dtype if quantised else np.dtype(np.float32) if len(stored) > 1 else stored.pop()
        wanted[role] = jax.ShapeDtypeStruct(leaf.shape, own, sharding=leaf.sharding)
    return wanted


def _write(
    step: Path,
    checkpoint: Checkpoint,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    layout: Plan,
    progress: Progress | None,
) -> None:
    total, done = sum(map(_bytes, wanted.values())), 0
    for roles in _groups(wanted):
        group = {role: wanted[role] for role in roles}
        report = (lambda now, _, before=done: progress(before + now, total)) if progress else None
        arrays = load_parameters(checkpoint.files, layout, group, report)
        named: Any = {PARAMETERS + role: array for role, array in arrays.items()}
        v1.partial.save(str(step), named)
        done += sum(map(_bytes, group.values()))
    v1.partial.finalize(str(step))
    seal(step / STATE, None)


def _groups(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Roles in runs of about _GROUP_BYTES; a larger parameter stands alone."""
    group: list[str] = []
    size = 0
    for role, leaf in wanted.items():
        if group and size + _bytes(leaf) > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(role)
        size += _bytes(leaf)
    yield group


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _converted(leaves: Sequence[jax.ShapeDtypeStruct]) -> Converted:
    dtypes = {leaf.dtype.name for leaf in leaves}
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    return Converted(parameters, sum(map(_bytes, leaves)), dtypes.pop() if len(dtypes) == 1 else "mixed")
