"""Placing batches: parts take rows in turn, empty rows are no targets, and processes put down what they read."""

import jax
import numpy as np
import pytest

from moejax.model import Options, lay
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.placing import Placing


def rows(count: int) -> Batch:
    numbers = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
    return Batch(numbers, numbers + 1000, np.ones_like(numbers), numbers % 3)


@pytest.mark.parametrize("spec", ["ep=1,tp=1", "ep=4,tp=2"])
def test_rows_go_to_the_parts_in_turn(spec, mesh):
    lie = lay(4, mesh(spec), Options())
    placed = Placing(lie, 2)(rows(8))
    want = rows(8)
    for name in ("tokens", "targets", "segments", "positions"):
        array = getattr(placed, name)
        np.testing.assert_array_equal(array, np.stack([getattr(want, name)[0::2], getattr(want, name)[1::2]]))
        assert array.sharding.spec == jax.sharding.PartitionSpec(None, *lie.stream.batch_spec)


def test_rows_that_fill_up_the_mesh_have_no_targets(mesh):
    lie = lay(6, mesh("ep=4,tp=2"), Options(strategy="all_to_all"))
    placed = Placing(lie, 1)(rows(6))
    assert placed.tokens.shape == (1, 8, 3)
    np.testing.assert_array_equal(placed.targets[0, :6], rows(6).targets)
    assert (np.asarray(placed.targets)[0, 6:] == NO_TARGET).all()
    assert not np.asarray(placed.segments)[0, 6:].any()
