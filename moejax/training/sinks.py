"""Where a run's records go: metrics.jsonl, and TensorBoard's event files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moejax.errors import MoejaxError


class Sink(Protocol):
    """Takes the record of each step, in order."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, there for readers as soon as its step is done."""

    def __init__(self, path: Path, after: int) -> None:
        """Opens the file behind the records of steps up to `after`; later ones, of steps that will be repeated, go.

        Raises:
          MoejaxError: the file cannot be read or written.
        """
        self._path = path
        try:
            if path.exists():
                _keep_up_to(path, after)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise MoejaxError(f"cannot write {path}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files with the numbers of every record; lists are left out, and what is not finite."""

    def __init__(self, folder: Path, after: int) -> None:
        """What the folder has of steps beyond `after`, TensorBoard no longer shows."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that a kill cut short is left out.

    Raises:
      MoejaxError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise MoejaxError(f"cannot read {path}: {error.strerror}") from error
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _keep_up_to(path: Path, last: int) -> None:
    kept = [record for record in read_records(path) if record["step"] <= last]
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
