"""One checkpoint of a run, as it lies on disk, and the reading of it.

A checkpoint is a folder named by its step, which orbax writes beside that name and renames when all is there:

    300/state/               a PyTree of orbax: one dictionary, dotted name -> array in neutral form, such as
                             "params.layers.0.moe.gate_up" [E, D, 2, F]; after `moejax convert`, parameters only
    300/state/record.json    {"format": 1, "data": position of the data or null, "files": {name: [bytes, CRC-32]}}
    300/metrics/metrics      {"score": 1.25}, or null
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moejax.errors import MoejaxError
from moejax.run_checkpoints.sealing import array_handler, unseal

STATE = "state"


@dataclass(frozen=True)
class StoredState:
    """A checkpoint that was found whole.

    Attributes:
      folder: of the step.
      arrays: name -> shape and dtype.
      data: the data's position, or None.
    """

    folder: Path
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    data: Mapping[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> "StoredState":
        """Reads every file once, to compare it with the record.

        Raises:
          MoejaxError: there is no such checkpoint, or it is damaged.
        """
        if not folder.is_dir():
            raise MoejaxError(f"there is no checkpoint {folder}")
        try:
            data = unseal(folder / STATE)
        except MoejaxError as error:
            raise MoejaxError(f"{error}; remove {folder}, and the checkpoint before it is the latest") from error
        tree = array_handler().metadata((folder / STATE).absolute()).tree  # type: ignore[arg-type]
        arrays = {name: jax.ShapeDtypeStruct(a.shape, np.dtype(a.dtype)) for name, a in tree.items()}
        return cls(folder, arrays, data)

    def check(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """
        Raises:
          MoejaxError: arrays are missing, left over, or of another shape or dtype; one message for all of them.
        """
        faults = {
            "missing": [name for name in wanted if name not in self.arrays],
            "left over": [name for name in self.arrays if name not in wanted],
            "of another form": [
                f"{name} is {_spelled(self.arrays[name])} and should be {_spelled(leaf)}"
                for name, leaf in wanted.items()
                if name in self.arrays and _spelled(self.arrays[name]) != _spelled(leaf)
            ],
        }
        found = [f"{len(names)} {kind} ({_few(names)})" for kind, names in faults.items() if names]
        if found:
            raise MoejaxError(
                f"the arrays in {self.folder} do not fit: {'; '.join(found)}; they are of the model and the optimizer "
                "that it was saved with"
            )

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some of the arrays, or all, each device reading its part of them.

        Args:
          wanted: name -> the array's own shape and dtype, and the sharding to read it into.
        """
        restore_args = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        arguments = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=restore_args, partial_restore=True)
        with ocp.Checkpointer(array_handler()) as reader:
            return reader.restore((self.folder / STATE).absolute(), arguments)


def saved_steps(folder: Path) -> list[int]:
    """The steps that a run's folder of checkpoints holds, in order."""
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def _spelled(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype.name} [{', '.join(map(str, leaf.shape))}]"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
