"""Fair timing on a noisy machine: every contender runs once in each round, in turn; medians over the rounds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds: its median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Quartiles as numpy draws them, between neighbours; one value is all three."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def as_json(self) -> dict[str, float]:
        return asdict(self)


def interleave(
    contenders: Mapping[str, Callable[[], T]], rounds: int, tick: Callable[[str, int], None] = lambda name, number: None
) -> dict[str, list[T]]:
    """What each contender returned in each round: A B A B ... after one round of warm-up that is left out.

    Args:
      contenders: by name, in the order in which they take turns.
      rounds: at least 1.
      tick: called before each run with the contender and the number of the round, 0 for the warm-up.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            tick(name, number)
            result = run()
            if number:
                results[name].append(result)
    return results
