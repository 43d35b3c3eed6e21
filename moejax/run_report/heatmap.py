"""Heatmaps of experts' load as SVG: cells in the colour of their load, as multiples of the even share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from jaxtyping import Float, Int

from moejax.run_report.axis import round_step
from moejax.run_report.colours import LEVELS, level_colour, levels

LEFT, TOP, BOTTOM = 38, 20, 30
ENDS = (2, 4, 8)
"""Multiples of the even share that a scale may end at; it begins at the inverse."""


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Cells `[rows, columns]`.

    Attributes:
      title: above it.
      cells: the load of each over the even share.
      row, column: what they are, such as "layer" and "expert".
      row_names, column_names: of each.
      size: width and height of the cells together.
      ticks: (column, name) to write under the cells in place of the columns' own names; parts of a column count.
    """

    title: str
    cells: Float[np.ndarray, "rows columns"]
    row: str
    column: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    size: tuple[float, float]
    ticks: Sequence[tuple[float, str]] = field(default=())

    @property
    def width(self) -> float:
        return LEFT + self.size[0] + 10

    @property
    def height(self) -> float:
        return TOP + self.size[1] + BOTTOM

    def svg(self, end: int) -> str:
        """The picture by itself; the scale ends at `end` times the even share."""
        return (
            f'<svg class="heatmap" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" role="img" '
            f'aria-label="{escape(self.title)}" data-row="{self.row}" data-rows="{" ".join(self.row_names)}" '
            f'data-column="{self.column}" data-columns="{" ".join(self.column_names)}" '
            f'data-box="{LEFT} {TOP} {self.size[0]:g} {self.size[1]:g}">{self.drawn(end)}</svg>'
        )

    def drawn(self, end: int) -> str:
        """What is inside that picture."""
        (rows, columns), (width, height) = self.cells.shape, self.size
        high, wide = height / rows, width / columns
        parts = [
            f'<text class="title" x="{LEFT}" y="{TOP - 7}">{escape(self.title)}</text>'
            f'<g transform="translate({LEFT} {TOP}) scale({wide:.5g} {high:.5g})" shape-rendering="crispEdges">'
            f"{_cells(levels(self.cells, end), end)}</g>"
        ]
        for row in _named(rows, height / 13):
            parts.append(_tick(LEFT - 5, TOP + (row + 0.5) * high + 4, self.row_names[row], "end"))
        room = 7 * max(map(len, self.column_names)) + 10
        own = [(column + 0.5, self.column_names[column]) for column in _named(columns, width / room)]
        parts += [_tick(LEFT + at * wide, TOP + height + 12, name) for at, name in self.ticks or own]
        middle = f"{TOP + height / 2:.1f}"
        return "".join(parts) + (
            f'<text class="label" x="{LEFT + width:.1f}" y="{TOP + height + 25:.1f}" text-anchor="end">{self.column}'
            f'</text><text class="label" x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">'
            f"{self.row}</text>"
        )


def scale_end(heatmaps: Sequence[Heatmap]) -> int:
    """Where the common scale of these heatmaps ends: where the highest load does, within ENDS."""
    highest = max((float(each.cells.max()) for each in heatmaps), default=0.0)
    return next((end for end in ENDS if highest <= end), ENDS[-1])


def legend(end: int) -> str:
    """The scale as a picture."""
    return f'<svg class="scale" viewBox="0 0 300 36" width="300" role="img">{legend_drawn(end)}</svg>'


def legend_drawn(end: int) -> str:
    """What is inside that picture: 300 wide and 36 high."""
    parts = [
        f'<rect x="{20 + 4 * level}" y="2" width="4" height="12" fill="{level_colour(level)}"/>'
        for level in range(LEVELS)
    ]
    powers = range(-ENDS.index(end) - 1, ENDS.index(end) + 2)
    for power in powers:
        at = 22 + 4 * (LEVELS - 1) * (power / powers[-1] / 2 + 0.5)
        name = "even" if power == 0 else f"{2**power}x" if power > 0 else f"1/{2**-power}"
        sign = "≤" if power == powers[0] else "≥" if power == powers[-1] else ""
        parts.append(f'<path class="axis" d="M{at:.1f} 14v4"/>' + _tick(at, 30, sign + name))
    return "".join(parts)


def _cells(found: Int[np.ndarray, "rows columns"], end: int) -> str:
    """One path for each level, of unit cells; neighbours of one level in a row are one piece."""
    pieces: dict[int, list[str]] = {}
    for row, line in enumerate(found):
        starts = np.flatnonzero(np.diff(line, prepend=-1)).tolist()
        for begin, stop in zip(starts, [*starts[1:], len(line)], strict=True):
            pieces.setdefault(int(line[begin]), []).append(f"M{begin} {row}h{stop - begin}v1h{begin - stop}z")
    return "".join(
        f'<path fill="{level_colour(level)}" data-load="{_load_of(level, end)}" d="{"".join(parts)}"/>'
        for level, parts in sorted(pieces.items())
    )


def _load_of(level: int, end: int) -> str:
    """The load that a level stands for, to be read under the pointer."""
    sign = "at most " if level == 0 else "at least " if level == LEVELS - 1 else ""
    return f"{sign}{end ** (2 * level / (LEVELS - 1) - 1):.2f}"


def _tick(x: float, y: float, name: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'


def _named(count: int, most: float) -> range:
    """Indices that are written out, evenly spaced so that they do not run into each other."""
    return range(0, count, max(1, int(round_step(count / max(most, 1)))))
