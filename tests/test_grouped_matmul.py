"""grouped_matmul against a loop over rows: values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import compiled, normal, relative

from moejax.kernels.grouped_matmul import LARGEST_TILE, grouped_matmul

INNER, OUTER = 5, 7


def by_rows(x, w, sizes, dy):
    """y, dx and dw, one row at a time in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(w)), sizes)):
        y[row], dx[row] = x[row] @ w[group], dy[row] @ w[group].T
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@compiled
def with_gradients(x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pullback(dy)


def check(rows, sizes, garbage=0.0):
    rng = np.random.default_rng(rows)
    x, w, dy = normal(rng, rows, INNER), normal(rng, len(sizes), INNER, OUTER), normal(rng, rows, OUTER)
    past = np.arange(rows)[:, None] >= sum(sizes)
    want = by_rows(x, w, sizes, dy)
    x, dy = jnp.where(past, garbage, x), jnp.where(past, garbage, dy)
    got = with_gradients(x, w, jnp.array(sizes, jnp.int32), dy)
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert relative(a, b) < 1e-5, name
        assert not np.asarray(a)[b == 0].any(), f"{name} is not exactly zero where nothing contributes"


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (12, [3, 0, 5, 4]),
        (12, [0, 0, 12, 0]),
        (12, [12, 0, 0, 0]),
        (12, [0, 0, 0, 0]),
        (1, [0, 1]),
        (9, [9]),
        (3, [1, 0, 0, 0, 1, 0, 0, 0, 0]),
        (2 * LARGEST_TILE + 3, [LARGEST_TILE + 1, LARGEST_TILE - 1, 0]),
        (6 * LARGEST_TILE, [5 * LARGEST_TILE + 1, 0, 1]),
    ],
)
def test_equals_a_loop(rows, sizes):
    check(rows, sizes)


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan, 3e38])
def test_rows_past_the_last_group_may_hold_anything(garbage):
    check(13, [3, 0, 2, 4], garbage)


def test_a_foreign_row_does_not_reach_its_neighbours():
    """Tiles reach into the next group's rows; what is there, inf included, stays there."""
    x = jnp.ones((8, INNER)).at[3].set(jnp.inf)
    w = jnp.ones((2, INNER, OUTER))
    y, dx, dw = with_gradients(x, w, jnp.array([3, 5], jnp.int32), jnp.ones((8, OUTER)))
    assert np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isfinite(dx).all()
    assert np.isfinite(dw[0]).all() and np.isinf(dw[1]).all()


def test_no_rows():
    x, w, sizes = jnp.zeros((0, INNER)), jnp.ones((3, INNER, OUTER)), jnp.zeros(3, jnp.int32)
    y, dx, dw = with_gradients(x, w, sizes, jnp.zeros((0, OUTER)))
    assert y.shape == (0, OUTER) and dx.shape == x.shape
    assert not np.asarray(dw).any()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_group_sizes(data):
    rows, groups = data.draw(st.sampled_from([(40, 4), (7, 5)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
    check(rows, [b - a for a, b in zip([0, *cuts], cuts, strict=False)])


def test_bfloat16_is_accumulated_in_float32():
    rng = np.random.default_rng(0)
    x, w = normal(rng, 6, 512).astype(jnp.bfloat16), normal(rng, 2, 512, 3).astype(jnp.bfloat16)
    y = compiled(grouped_matmul)(x, w, jnp.array([2, 4], jnp.int32))
    assert y.dtype == jnp.bfloat16
    want = by_rows(x, w, [2, 4], jnp.zeros((6, 3)))[0]
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)
