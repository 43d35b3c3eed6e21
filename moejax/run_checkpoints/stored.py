"""One checkpoint of a run, as it lies on disk, and the reading of it.

A checkpoint is a folder named by its step, which orbax writes beside that name and renames when all is there:

    300/state/                 a PyTree of orbax: one dictionary, dotted name -> array in neutral form, such as
                               "params.layers.0.moe.gate_up" [E, D, 2, F] float32; a converted one has "params." only
    300/metrics/metrics        {"score": 1.25}, where the run has scored the step
    300/_CHECKPOINT_METADATA   orbax's own; "custom_metadata" is our record: {"format": 1, "data": {...}}, the data's
                               position or null
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from moejax.errors import MoejaxError

STATE = "state"
"""Name of the arrays' folder."""

FORMAT = 1


def record_of(data: Mapping[str, Any] | None) -> dict[str, Any]:
    """What stands beside the arrays."""
    return {"format": FORMAT, "data": data}


@dataclass(frozen=True)
class StoredState:
    """A checkpoint, opened: no array is read yet.

    Attributes:
      folder: of the step.
      arrays: name -> shape and dtype.
      data: the data's position, or None.
    """

    folder: Path
    arrays: Mapping[str, jax.ShapeDtypeStruct]
    data: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> "StoredState":
        """
        Raises:
          MoejaxError: there is no such checkpoint, or what describes it is damaged.
        """
        if not folder.is_dir():
            raise MoejaxError(f"there is no checkpoint {folder}")
        try:
            with _reader() as reader:
                metadata = reader.metadata(folder.absolute())
            tree = metadata.item_metadata[STATE].tree
            arrays = {name: jax.ShapeDtypeStruct(a.shape, np.dtype(a.dtype)) for name, a in tree.items()}
            record = metadata.custom_metadata
            if record["format"] != FORMAT:
                raise MoejaxError(
                    f"{folder} is of format {record['format']!r}, and this version of moejax reads {FORMAT}; use the "
                    "version that wrote it"
                )
            return cls(folder, arrays, record["data"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            if isinstance(error, MoejaxError):
                raise
            raise _damaged(folder, error) from error

    def check(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """
        Raises:
          MoejaxError: arrays are missing, left over, or of another shape or dtype; one message for all of them.
        """
        faults = {
            "missing": [name for name in wanted if name not in self.arrays],
            "left over": [name for name in self.arrays if name not in wanted],
            "other": [
                f"{name} is {_spelled(self.arrays[name])} and should be {_spelled(leaf)}"
                for name, leaf in wanted.items()
                if name in self.arrays and _spelled(self.arrays[name]) != _spelled(leaf)
            ],
        }
        found = [f"{len(names)} {kind} ({_few(names)})" for kind, names in faults.items() if names]
        if found:
            raise MoejaxError(
                f"the arrays in {self.folder} are not this run's: {'; '.join(found)}; resume with the model and the "
                "optimizer that it was saved with"
            )

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some of the arrays, or all, each device reading its part of them.

        Args:
          wanted: name -> the array's own shape and dtype, and the sharding to read it into.

        Raises:
          MoejaxError: the files are damaged.
        """
        arguments = ocp.args.PyTreeRestore(
            item=dict(wanted),
            restore_args={
                name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
                for name, leaf in wanted.items()
            },
            partial_restore=True,
        )
        try:
            with _reader() as reader:
                return dict(reader.restore(self.folder.absolute(), ocp.args.Composite(**{STATE: arguments}))[STATE])
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # orbax raises bare Exceptions too for what it cannot read
            raise _damaged(self.folder, error) from error


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes and reads the arrays."""
    # To share the writing of a replicated array out among its devices takes a small program for every shape.
    arrays = type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**{STATE: array_handler()}))


def _damaged(folder: Path, error: Exception) -> MoejaxError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" See full")[0]
    return MoejaxError(
        f"{folder} is damaged or incomplete ({reason[:160]}); remove it, and the checkpoint before it is the latest"
    )


def _spelled(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype.name} [{', '.join(map(str, leaf.shape))}]"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
