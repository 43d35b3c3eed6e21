"""Colours that differ for colour-blind eyes too, on a light page and on a dark one.

Lines take the palette of Okabe and Ito 2008, "Color Universal Design", as far as it is legible on both. Loads go from
blue (fewer tokens than the even share) over near white to orange (more), lightness falling to either side.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

LEVELS = 65
"""Of a heatmap; the middle one is the even share."""
_SERIES = ("#0f7fc4", "#d55e00", "#009e73", "#cc79a7", "#b98a00", "#56a0d9", "#8c6bd1", "#7f7f7f")
_DASHES = ("", "5 3", "2 3")
_LOAD = ("#123a7c", "#3f7cc4", "#9cc3e6", "#f3f0ea", "#f6b777", "#d9741f", "#8f3a06")
_DEPTH = ("#3f78c9", "#8a6fc0", "#c9659a", "#dd6e5c", "#d8912b")


def series(index: int) -> tuple[str, str]:
    """The colour and the dashes of the line number `index`."""
    return _SERIES[index % len(_SERIES)], _DASHES[index // len(_SERIES) % len(_DASHES)]


def depth(index: int, count: int) -> str:
    """The colour of layer `index` of `count`, from blue at the first to orange at the last."""
    return _between(_DEPTH, index / max(count - 1, 1))


def level_colour(level: int) -> str:
    """The colour of a heatmap's level, from 0 to LEVELS - 1."""
    return _between(_LOAD, level / (LEVELS - 1))


def levels(loads: Float[np.ndarray, "..."], end: float) -> Int[np.ndarray, "..."]:
    """The level of each load over the even share, by its logarithm; the scale goes from 1 / `end` to `end`."""
    shares = np.log(np.maximum(loads, 1e-9)) / np.log(end) / 2 + 0.5
    return np.clip(np.round(shares * (LEVELS - 1)), 0, LEVELS - 1).astype(np.int64)


def _between(stops: Sequence[str], share: float) -> str:
    colours = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops])
    at = share * (len(stops) - 1)
    mixed = [np.interp(at, np.arange(len(stops)), channel) for channel in colours.T]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)
