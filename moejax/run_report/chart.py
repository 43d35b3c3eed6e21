"""A line chart as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from moejax.run_report.axis import Axis, short
from moejax.run_report.curves import Curve

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 8, 36
POINTS = 500
"""Of a line: about one a pixel."""


@dataclass(frozen=True, eq=False)
class Line:
    """One curve of a chart.

    Attributes:
      label: in the legend.
      curve: finite values.
      colour: of CSS.
      dash: of SVG, "" for a line without gaps.
      band: the least and the largest around the line, drawn faintly.
      marked: each point is drawn, since there are few.
    """

    label: str
    curve: Curve
    colour: str
    dash: str = ""
    band: tuple[Curve, Curve] | None = None
    marked: bool = False


@dataclass(frozen=True, eq=False)
class Chart:
    """Lines over steps.

    Attributes:
      title: above it, with the unit.
      lines: drawn in this order.
      note: a sentence under the title.
      from_zero: the axis begins at 0.
      logarithmic: of values.
      bound: a value that is marked across, and what it is.
    """

    title: str
    lines: Sequence[Line]
    note: str = ""
    from_zero: bool = False
    logarithmic: bool = False
    bound: tuple[float, str] | None = None
    legend: Sequence[tuple[str, str, str]] = field(default=())
    """(label, colour, dash) in place of the lines' own."""

    def entries(self) -> list[tuple[str, str, str]]:
        """The legend; that of a single line without a name is empty."""
        own = [(line.label, line.colour, line.dash) for line in self.lines if line.label]
        return list(self.legend or own)

    def svg(self) -> str:
        """The picture, in the colours of the page it is on."""
        x, y = self._x(), self._y()
        parts = [*_grid(x, y), *self._bound(y), '<g clip-path="url(#plot)">']
        faint = 0.25 if len(self.lines) == 1 else 0.12
        parts += [_band(line, x, y, faint) for line in self.lines if line.band]
        parts += [_polyline(line, x, y) for line in self.lines]
        parts.append(_cut_off(self.lines, y))
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}" '
            f"{_data('x', x)} {_data('y', y)}>{''.join(parts)}</g></svg>"
        )

    def _x(self) -> Axis:
        first = min(float(line.curve.steps[0]) for line in self.lines)
        last = max(float(line.curve.steps[-1]) for line in self.lines)
        return Axis.over(first, last, LEFT, WIDTH - RIGHT)

    def _y(self) -> Axis:
        low, high = _reach(self.lines, self.logarithmic)
        if self.bound:
            low, high = min(low, self.bound[0]), max(high, self.bound[0])
        low = 0.0 if self.from_zero else low
        room = 0.04 * (high - low)
        if not self.logarithmic:
            low, high = low - (0 if self.from_zero else room), high + room
        return Axis.over(low, high, HEIGHT - BOTTOM, TOP, self.logarithmic)

    def _bound(self, y: Axis) -> list[str]:
        if not self.bound:
            return []
        at, right = float(y.place(self.bound[0])), WIDTH - RIGHT
        low = at > HEIGHT - BOTTOM - 15
        beside, anchor, by = (LEFT + 4, "start", at - 4) if low else (right, "end", at + 12)
        return [
            f'<path class="bound" d="M{LEFT} {at:.1f}H{right}"/>',
            f'<text class="tick" x="{beside}" y="{by:.1f}" text-anchor="{anchor}">{escape(self.bound[1])}</text>',
        ]


def _reach(lines: Sequence[Line], logarithmic: bool) -> tuple[float, float]:
    """What the axis of values holds: all of the lines, and of their bands all but the rarest peaks.

    How a run begins would press the rest flat, so of a long curve the first steps may be cut off.
    """
    lows, highs = [], []
    for line in lines:
        values = line.curve.values
        settled = values[len(values) // 25 :]
        lows.append(values.min() if line.band is None else np.quantile(line.band[0].values, 0.002))
        highs.append(values.max() if line.band is None else max(settled.max(), np.quantile(line.band[1].values, 0.97)))
    if logarithmic:
        lows = [low for low in lows if low > 0] or [1.0]
        return min(lows), max(*highs, min(lows))
    return float(min(lows)), float(max(highs))


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in y.ticks(5):
        at = float(y.place(value))
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x.ticks(7):
        at = float(x.place(value))
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    return parts


def _band(line: Line, x: Axis, y: Axis, opacity: float) -> str:
    low, high = line.band or (line.curve, line.curve)
    points = _points(x.place([*high.steps, *low.steps[::-1]]), y.place([*high.values, *low.values[::-1]]), 1)
    return f'<polygon opacity="{opacity}" fill="{line.colour}" stroke="{line.colour}" points="{points}"/>'


def _polyline(line: Line, x: Axis, y: Axis) -> str:
    curve = line.curve.thinned(POINTS)
    px, py = x.place(curve.steps), y.place(curve.values)
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    drawn = (
        f'<polyline class="line" data-label="{escape(line.label)}" stroke="{line.colour}"{dash} '
        f'points="{_points(px, py, 2)}"/>'
    )
    if line.marked or len(curve) == 1:
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(px, py, strict=True))
        drawn += f'<path class="dots" stroke="{line.colour}" d="{dots}"/>'
    return drawn


def _cut_off(lines: Sequence[Line], y: Axis) -> str:
    """Where a beginning lies above the axis, how high it does."""
    begins = [float(line.curve.values[0]) for line in lines]
    if max(begins) <= y.high:
        return ""
    highest = short(float(f"{max(begins):.3g}"))
    return f'<text class="tick" x="{WIDTH - RIGHT}" y="{TOP + 12}" text-anchor="end">begins at {highest}</text>'


def _points(px: np.ndarray, py: np.ndarray, digits: int) -> str:
    return " ".join(f"{a:.{digits}f},{b:.{digits}f}" for a, b in zip(px, py, strict=True))


def _data(name: str, axis: Axis) -> str:
    """What the page's script needs to read values off."""
    return f'data-{name}="{axis.low} {axis.high} {axis.begin} {axis.end} {int(axis.logarithmic)}"'
