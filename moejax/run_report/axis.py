"""An axis: from values to places in a picture, and the round values that are written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` lie from place `begin` to place `end`, evenly or by their logarithm."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, low: float, high: float, begin: float, end: float, logarithmic: bool = False) -> "Axis":
        """One that holds these values, with some room where they are all the same."""
        logarithmic = logarithmic and low > 0
        if low == high:
            room = abs(low) / 2 or 0.5
            low, high = (low / 2, high * 2) if logarithmic else (low - room, high + room)
        return cls(low, high, begin, end, logarithmic)

    def place(self, values: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """Where values are drawn."""
        low, high, at = (self._scale(v) for v in (self.low, self.high, values))
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values within the axis; powers of ten, or 1, 2, 5, 10, ..., of a logarithmic one."""
        if self.logarithmic and self.high / self.low >= 4:
            first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
            factors = (1, 2, 5) if 3 * (last - first) <= most else (1,)
            every = math.ceil((last - first + 1) / most)
            values = (factor * 10.0**power for power in range(first, last + 1, every) for factor in factors)
            return [value for value in values if self.low <= value <= self.high]
        step = round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _scale(self, values: float | Sequence[float] | np.ndarray) -> np.ndarray:
        array = np.asarray(values, np.float64)
        return np.log10(np.maximum(array, self.low * 1e-3)) if self.logarithmic else array


def round_step(least: float) -> float:
    """The smallest of ..., 1, 2, 5, 10, 20, ... that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def short(value: float) -> str:
    """A number in few letters, such as "12k", "0.35", "3e-4"."""
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if size >= 10 * unit), (1.0, ""))
    return f"{value / unit:.5g}{letter}" if size < 10_000 or letter else f"{value:.4g}"
