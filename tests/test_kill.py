"""Runs that are killed: what they lose is what they had not saved, and what they go on to is the same to the bit."""

import random

import numpy as np
import pytest
from kill_drill import Drill

OF_TIME = ("seconds", "tokens_per_s")


def learned(records: list[dict]) -> list[dict]:
    """What of records does not depend on the clock."""
    return [{name: value for name, value in record.items() if name not in OF_TIME} for record in records]


def assert_same_run(drill: Drill, run: str, other: str, step: int) -> None:
    a, b = drill.state(run, step), drill.state(other, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert learned(drill.records(run)[:step]) == learned(drill.records(other)[:step])


def assert_nothing_unfinished(drill: Drill, run: str) -> None:
    assert all(path.name.isdigit() for path in (drill.root / run / "checkpoints").iterdir())


def test_a_run_killed_twice_is_the_same_and_goes_on_on_another_mesh(tmp_path):
    drill = Drill(tmp_path, every=2)
    drill.finish("whole", 10)
    assert drill.kill("killed", 8, drill.in_save("killed", 2, 0.0)) == (True, True)
    assert drill.kill("killed", 8, drill.in_step("killed", 1, 0.01)).done
    drill.finish("killed", 8)
    assert_nothing_unfinished(drill, "killed")
    assert_same_run(drill, "killed", "whole", 8)
    drill.finish("killed", 10, mesh="ep=2,tp=4")
    for got, want in zip(drill.records("killed"), drill.records("whole"), strict=True):
        assert abs(got["loss"] / want["loss"] - 1) < 1e-5
    got, want = drill.state("killed", 10), drill.state("whole", 10)
    assert {name: array.shape for name, array in got.items()} == {name: array.shape for name, array in want.items()}


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, capsys):
    drill, rng, steps = Drill(tmp_path, every=5), random.Random(7), 140
    drill.finish("whole", steps)
    moments = {
        "at the start": lambda: drill.after_start(rng.uniform(0.5, 8)),
        "in a step": lambda: drill.in_step("killed", rng.randint(1, 9), rng.uniform(0, 0.2)),
        "in a save": lambda: drill.in_save("killed", rng.randint(1, 2), rng.uniform(0, 0.1)),
    }
    kinds = [*["at the start"] * 4, *["in a step"] * 9, *["in a save"] * 11]
    rng.shuffle(kinds)
    kills = [drill.kill("killed", steps, moments[kind]()) for kind in kinds]
    drill.finish("killed", steps)
    assert_nothing_unfinished(drill, "killed")
    assert_same_run(drill, "killed", "whole", steps)
    done, in_save = sum(kill.done for kill in kills), sum(kill.in_save for kill in kills)
    assert done >= 20
    assert in_save >= 5
    with capsys.disabled():
        print(f"{done} kills, {in_save} of them in the middle of a save")
