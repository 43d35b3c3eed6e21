"""Attention over keys and values at hand, against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal, relative

from moejax.nn.attend import QUERY_BLOCK, attend, attend_causal

HEADS, GROUPS, WIDTH = 4, 2, 6


def inputs(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    q = normal(rng, batch, length, HEADS, WIDTH)
    return q, normal(rng, batch, GROUPS, length, WIDTH), normal(rng, batch, GROUPS, length, WIDTH)


def by_hand(q, k, v, visible):
    """Softmax over the visible keys; zeros where there are none."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, HEADS // GROUPS, 1) for a in (k, v))
    scores = np.einsum("bsnh,bnth->bnst", q, k) / np.sqrt(WIDTH)
    weights = np.where(visible[:, None], np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnst,bnth->bsnh", weights / np.where(total, total, 1), v)


def visible_by_hand(segments, window):
    segments = np.asarray(segments)
    batch, length = segments.shape
    visible = np.zeros((batch, length, length), bool)
    for b, s, t in np.ndindex(*visible.shape):
        near = t <= s and (window is None or t > s - window)
        visible[b, s, t] = near and segments[b, s] == segments[b, t] > 0
    return visible


def causal(window):
    return jax.jit(functools.partial(attend_causal, window=window))


SEGMENTS = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 0, 7, 7, 3, 3, 3, 1]], np.int32)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
def test_windows_and_segments(window):
    q, k, v = inputs(*SEGMENTS.shape)
    got = causal(window)(q, k, v, jnp.asarray(SEGMENTS))
    want = by_hand(q, k, v, visible_by_hand(SEGMENTS, window))
    real = SEGMENTS > 0
    assert np.isfinite(got).all()
    assert relative(np.asarray(got)[real], want[real]) < 1e-5


def test_what_sees_nothing_is_finite_and_so_are_its_gradients():
    q, k, v = inputs(*SEGMENTS.shape)
    nothing = jnp.zeros((3, 9, 9), bool)

    @jax.jit
    def run(q, k, v):
        out, pullback = jax.vjp(lambda *a: attend(*a, nothing), q, k, v)
        return out, pullback(jnp.ones_like(out))

    out, gradients = run(q, k, v)
    mean = np.repeat(np.asarray(v).mean(2), HEADS // GROUPS, 1)[:, None]
    assert relative(out, np.broadcast_to(mean, out.shape)) < 1e-5
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("length", [QUERY_BLOCK + 1, 2 * QUERY_BLOCK])
def test_blocks_of_queries_equal_all_at_once(length, window):
    q, k, v = inputs(1, length)
    segments = jnp.asarray(np.minimum(np.arange(length) // 300, 3)[None], jnp.int32)
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (
        (distance >= 0) & (distance < (window or length)) & (segments[0][:, None] == segments[0]) & (segments[0] > 0)
    )
    got = causal(window)(q, k, v, segments)
    direct = jax.jit(attend)(q, k, v, visible[None])
    real = np.asarray(segments) > 0
    assert relative(np.asarray(got)[real], np.asarray(direct)[real]) < 1e-6
    assert np.isfinite(got).all()


def test_half_precision_rounds_only_probabilities_and_values():
    q, k, v = (a.astype(jnp.bfloat16) for a in inputs(2, 5))
    segments = jnp.ones((2, 5), jnp.int32)
    got = causal(None)(q, k, v, segments)
    assert got.dtype == jnp.bfloat16
    want = by_hand(*(a.astype(jnp.float32) for a in (q, k, v)), visible_by_hand(segments, None))
    assert relative(got.astype(jnp.float32), want) < 2e-2
