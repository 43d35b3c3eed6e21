"""Curves over steps: what is drawn of many points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Curve:
    """Values at ascending steps; `values` is `[n]`, or `[n, E]` where each is a list of E numbers."""

    steps: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n ..."]

    @classmethod
    def of(cls, points: Sequence[tuple[int, float | Sequence[float]]]) -> "Curve":
        """From (step, value) pairs."""
        steps = np.array([step for step, _ in points], np.int64)
        return cls(steps, np.array([value for _, value in points], np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Curve":
        """Without the points that are no number, such as the loss of a step that was skipped."""
        keep = np.isfinite(self.values).reshape(len(self), -1).all(1)
        return Curve(self.steps[keep], self.values[keep])

    def smoothed(self, window: int) -> "Curve":
        """The mean over `window` points around each.

        At the beginning, where curves are steep, over as many before as behind; at the end over fewer behind.
        """
        index = np.arange(len(self))
        before = np.minimum(window // 2, index)
        behind = np.minimum(before, index[::-1])
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        return Curve(self.steps, (sums[index + behind + 1] - sums[index - before]) / (before + behind + 1))

    def thinned(self, most: int) -> "Curve":
        """At most `most` of the points, evenly spaced, the first and the last among them."""
        keep = evenly(len(self), most)
        return Curve(self.steps[keep], self.values[keep])

    def bins(self, most: int) -> "Curve":
        """The means of at most `most` runs of neighbouring points, each at its middle step."""
        starts = _starts(len(self), most)
        counts = np.diff([*starts, len(self)])
        means = np.add.reduceat(self.values, starts) / counts.reshape(-1, *[1] * (self.values.ndim - 1))
        return Curve(self.steps[starts + counts // 2], means)

    def band(self, most: int) -> tuple["Curve", "Curve"]:
        """The least and the largest of each such run."""
        starts = _starts(len(self), most)
        steps = self.steps[starts]
        return Curve(steps, np.minimum.reduceat(self.values, starts)), Curve(
            steps, np.maximum.reduceat(self.values, starts)
        )


def evenly(count: int, most: int) -> Int[np.ndarray, " n"]:
    """At most `most` of `count` indices, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)) if count else np.arange(0)


def _starts(count: int, most: int) -> Int[np.ndarray, " n"]:
    return np.arange(min(count, most)) * count // min(count, most)
