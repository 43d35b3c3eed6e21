"""Turns and spreads."""

import numpy as np
import pytest

from moejax.benchmarks.interleave import Spread, interleave


def test_every_contender_runs_once_in_each_round_and_the_first_round_is_left_out():
    log, ticks, clock = [], [], iter(range(100))

    def contender(name):
        def run():
            log.append(name)
            return next(clock)

        return run

    results = interleave({"a": contender("a"), "b": contender("b")}, 3, lambda *tick: ticks.append(tick))
    assert log == ["a", "b"] * 4
    assert results == {"a": [2, 4, 6], "b": [3, 5, 7]}
    assert ticks == [(name, number) for number in range(4) for name in "ab"]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_spread_is_the_median_and_the_quartiles(count):
    values = np.random.default_rng(count).random(count).tolist()
    spread = Spread.of(values)
    assert [spread.low, spread.median, spread.high] == pytest.approx(np.percentile(values, [25, 50, 75]))
