"""The record that closes a checkpoint's arrays: it names every file with its size and checksum.

orbax notices a missing file or one that ends early only as it reads, and a changed byte not at all. The record is
written last, when the files are complete and the folder does not have its name yet.
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from moejax.errors import MoejaxError

RECORD = "record.json"
FORMAT = 1
_BLOCK_BYTES = 1 << 20
_THREADS = 8


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Reads arrays."""
    return ocp.PyTreeCheckpointHandler(type_handler_registry=_registry())


class SealingHandler(ocp.PyTreeCheckpointHandler):
    """Writes arrays, and the record when orbax is done with them."""

    def __init__(self) -> None:
        super().__init__(type_handler_registry=_registry())
        self._data: Mapping[str, Any] | None = None

    async def async_save(self, directory: Any, args: "SealedSave") -> Any:  # type: ignore[override]
        self._data = args.data
        return await super().async_save(directory, args=ocp.args.PyTreeSave(args.item))

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        if jax.process_index() == 0:
            seal(Path(directory), self._data)


@ocp.args.register_with_handler(SealingHandler, for_save=True)
@dataclasses.dataclass
class SealedSave(ocp.args.PyTreeSave):
    """The arrays to save, and the data's position as JSON has it, or None."""

    data: Mapping[str, Any] | None = None


@ocp.args.register_with_handler(SealingHandler, for_restore=True)
@dataclasses.dataclass
class _SealedRestore(ocp.args.PyTreeRestore):
    """orbax wants one for every handler."""


@contextlib.contextmanager
def told(fault: str) -> Iterator[None]:
    """Turns what orbax raises when it cannot write or list files into one line that begins with `fault`."""
    try:
        yield
    except MoejaxError:
        raise
    except (OSError, ValueError) as error:
        # tensorstore names all that it was about before the cause.
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split()).rpartition(": ")[2]
        raise MoejaxError(f"{fault}: {reason}; make room or name another folder") from error


def seal(folder: Path, data: Mapping[str, Any] | None) -> None:
    """Writes the record of all files below `folder`, and the data's position."""
    files = {str(file.relative_to(folder)): _measure(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / RECORD).write_text(json.dumps({"format": FORMAT, "data": data, "files": files}), encoding="utf-8")


def unseal(folder: Path) -> Mapping[str, Any] | None:
    """Checks every file and returns the data's position.

    Several processes share the files out, so that each is read once.

    Raises:
      MoejaxError: what is wrong with which file.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found, files, data = record["format"], dict(record["files"]), record["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoejaxError(f"{folder / RECORD} is missing or damaged") from error
    if found != FORMAT:
        raise MoejaxError(f"{folder / RECORD} is of format {found!r}, and this version of moejax reads {FORMAT}")
    mine = sorted(files)[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, fault in zip(mine, pool.map(lambda name: _fault(folder / name, *files[name]), mine), strict=True):
            if fault:
                raise MoejaxError(f"{folder / name} {fault}")
    return data


def _fault(file: Path, size: int, checksum: int) -> str:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes and should have {size}"
    return "" if _measure(file) == (size, checksum) else f"does not hold the {size} bytes that were written"


def _measure(file: Path) -> tuple[int, int]:
    """Size and CRC-32."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
        return stream.tell(), checksum


def _registry() -> Any:
    # To share the writing of a replicated array out among its devices takes a small program for every shape.
    arrays = type_handlers.ArrayHandler(use_replica_parallel=False)
    return type_handlers.create_type_handler_registry((jax.Array, arrays))
