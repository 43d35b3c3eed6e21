"""A run's folder, read: its recipe, its model's config, and metrics.jsonl as curves."""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.source import read_json
from moejax.errors import MoejaxError
from moejax.run_report.curves import Curve, evenly

METRICS = "metrics.jsonl"
DENSE = ("loss", "grad_norm", "seconds")
"""Read of every line, so that no peak is missed and sums are whole."""
PARSED = 1500
"""Lines of which everything is read, besides those of evaluations."""
_NUMBER = re.compile(rb'"(step|loss|grad_norm|seconds)": ?([^,}\s]+)')


@dataclass(frozen=True, eq=False)
class Run:
    """What a run left.

    Attributes:
      name: the folder's, or as much of its path as tells it from other runs.
      recipe: recipe.toml as it was resolved; {} where there is none.
      model: the model's config.json; {} where there is none.
      curves: by the metric's name; values are lists where the metric is one.
      last: everything that was said of the last step.
      unreadable: lines that are no metrics, as a run that is killed leaves them.
    """

    name: str
    recipe: Mapping[str, Any]
    model: Mapping[str, Any]
    curves: Mapping[str, Curve]
    last: Mapping[str, Any]
    unreadable: int

    def under(self, prefix: str) -> dict[str, Curve]:
        """The curves whose names begin so, by the rest of their names, in the order of these and of their numbers."""
        names = sorted((name for name in self.curves if name.startswith(prefix)), key=_natural)
        return {name.removeprefix(prefix): self.curves[name] for name in names}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
      MoejaxError: a folder that is no run, or has no step yet.
    """
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise MoejaxError(f"there is no folder {folder}; name the one that moejax train was given as --run")
    path = folder / METRICS
    if not path.is_file():
        raise MoejaxError(f"{folder} has no {METRICS}, so it is no run; moejax train --run {folder} would write one")
    curves, last, unreadable = read_metrics(path)
    return Run(name, _recipe(folder / "recipe.toml"), _model(folder / "model"), curves, last, unreadable)


def read_metrics(path: Path) -> tuple[dict[str, Curve], dict[str, Any], int]:
    """The curves of a metrics.jsonl, what the last step says, and how many lines could not be read.

    A line makes those before it void that are of its step or a later one: a run was resumed there. Of a long file
    every line gives its loss, gradient norm and seconds, and some of them the rest.

    Raises:
      MoejaxError: no line can be read.
    """
    steps, offsets, evaluated, dense, unreadable = _scan(path)
    alive = np.flatnonzero(steps < np.minimum.accumulate(np.append(steps, np.iinfo(np.int64).max)[::-1])[::-1][1:])
    chosen = sorted({*alive[evenly(len(alive), PARSED)].tolist(), *alive[evaluated[alive]].tolist()})
    rows = list(_parsed(path, offsets[chosen].tolist()))
    if not rows:
        raise MoejaxError(f"{path} holds no step yet; wait for the run's first, or look at what it printed")
    points: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float | list) and name != "step":
                points[name].append((row["step"], value))
    curves = {name: Curve.of(values).finite() for name, values in points.items()}
    curves |= {name: Curve(steps[alive], dense[name][alive]).finite() for name in DENSE}
    return {name: curve for name, curve in curves.items() if len(curve)}, rows[-1], unreadable


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray], int]:
    """Of each line its step, where its object begins, whether there was an evaluation, and the dense metrics."""
    steps, offsets, evaluated, dense = [], [], [], {name: [] for name in DENSE}
    unreadable = at = 0
    with path.open("rb") as file:
        for line in file:
            begin = line.rfind(b"{")  # of the last object: a line that was cut off has the next one behind it
            found = {name.decode(): value for name, value in _NUMBER.findall(line, begin)} if begin >= 0 else {}
            unreadable += begin != 0
            if line.rstrip().endswith(b"}") and found.get("step", b"").isdigit():
                steps.append(int(found["step"]))
                offsets.append(at + begin)
                evaluated.append(b'"eval/' in line)
                for name in DENSE:
                    dense[name].append(_float(found.get(name, b"nan")))
            else:
                unreadable += begin == 0
            at += len(line)
    columns = {name: np.array(values, np.float64) for name, values in dense.items()}
    return np.array(steps, np.int64), np.array(offsets, np.int64), np.array(evaluated, bool), columns, unreadable


def _parsed(path: Path, offsets: Iterable[int]) -> Iterable[dict[str, Any]]:
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            try:
                yield json.loads(file.readline())
            except ValueError:
                continue


def _float(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoejaxError(f"{path} is no TOML ({error}); it is the run's own copy, restore or remove it") from error


def _model(folder: Path) -> dict[str, Any]:
    return read_json(folder, "config.json", required=False)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort by that knows that layer_100 comes after layer_99."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many folders above it as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(folder) for folder in folders]
