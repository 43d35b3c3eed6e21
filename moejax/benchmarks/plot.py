"""Results as a picture. matplotlib comes with the notebook extra and is imported when a plot is asked for."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.errors import MoejaxError

SUFFIXES = (".png", ".svg")


@dataclass
class Panel:
    """One set of axes: for each line its points (x, median, low, high)."""

    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)

    def add(self, line: str, x: float, spread: Mapping[str, float], scale: Callable[[float], float]) -> None:
        """A point whose value is `scale` of seconds; a falling scale swaps the quartiles."""
        low, high = sorted(scale(spread[name]) for name in ("low", "high"))
        self.lines.setdefault(line, []).append((x, scale(spread["median"]), low, high))


def check_plot(path: str | None) -> None:
    """Raises MoejaxError, before anything is measured, where a plot is asked for that cannot be made."""
    if path is None:
        return
    if Path(path).suffix not in SUFFIXES:
        raise MoejaxError(f"--plot {path} must end in one of {', '.join(SUFFIXES)}")
    if not Path(path).parent.is_dir():
        raise MoejaxError(f"--plot {path}: there is no folder {Path(path).parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MoejaxError('--plot needs matplotlib; pip install "moejax[notebook]"')


def draw(panels: Sequence[Panel], path: str) -> None:
    """Writes the panels side by side; bars are quartiles, both axes from a logarithmic scale.

    Raises:
      MoejaxError: the file cannot be written.
    """
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            x, middle, low, high = (list(column) for column in zip(*sorted(points), strict=True))
            reach = [
                [m - v for m, v in zip(middle, low, strict=True)],
                [v - m for m, v in zip(middle, high, strict=True)],
            ]
            axes.errorbar(x, middle, yerr=reach, marker="o", capsize=3, label=name)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log", yscale="log")
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise MoejaxError(f"cannot write {path}: {error.strerror}") from error


def panels_of(result: Mapping[str, Any]) -> list[Panel]:
    """The panels of a benchmark's JSON result."""
    return _PANELS[result["benchmark"]](result)


def _generation(result: Mapping[str, Any]) -> list[Panel]:
    prefill = Panel("prefill", "batch size", "tokens/s")
    decode = Panel("decode", "batch size", "tokens/s")
    for batch in result["batches"]:
        size, prompt = batch["batch_size"], batch["batch_size"] * result["input_len"]
        for row in batch["rows"]:
            prefill.add(row["contender"], size, row["ttft_s"], lambda s, prompt=prompt: prompt / s)
            decode.add(row["contender"], size, row["tpot_s"], lambda s, size=size: size / s)
    return [prefill, decode]


def _layer(result: Mapping[str, Any]) -> list[Panel]:
    panel = Panel("one MoE block, forward", "tokens", "ms")
    for row in result["rows"]:
        panel.add(f"{row['mesh']} {row['strategy']}", row["tokens"], row["seconds"], lambda s: 1e3 * s)
    return [panel]


def _collectives(result: Mapping[str, Any]) -> list[Panel]:
    panel = Panel(f"collectives on {result['mesh']}", "bytes a device", "GB/s")
    for row in result["rows"]:
        panel.add(
            f"{row['collective']} {row['axes']}",
            row["bytes"],
            row["seconds"],
            lambda s, size=row["bytes"]: size / s / 1e9,
        )
    return [panel]


def _train(result: Mapping[str, Any]) -> list[Panel]:
    panel = Panel(f"training {result['model']}", "tokens of a step", "tokens/s")
    tokens = result["batch_size"] * result["seq_len"]
    for row in result["rows"]:
        panel.add(row["contender"], tokens, row["seconds"], lambda s: tokens / s)
    return [panel]


def _load(result: Mapping[str, Any]) -> list[Panel]:
    panel = Panel(f"loading {result['model']}", "bytes", "s")
    for row in result["rows"]:
        panel.add(row["contender"], result["bytes"], row["seconds"], lambda s: s)
    return [panel]


_PANELS: Mapping[str, Callable[[Mapping[str, Any]], list[Panel]]] = {
    "latency": _generation,
    "throughput": _generation,
    "layer": _layer,
    "train": _train,
    "collectives": _collectives,
    "load": _load,
}
