"""Attention under one rule of sight, against float64 numpy and against all scores at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal, relative

from moejax.kernels.attention.blocks import KEY_BLOCK, QUERY_BLOCK
from moejax.kernels.attention.reference import attend, causal
from moejax.kernels.attention.sight import Keys, queries_at, visible
from moejax.nn.attend import attend_causal, attend_places

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


def visible_by_hand(segments, window, chunk=None):
    segments = np.asarray(segments)
    batch, length = segments.shape
    visible = np.zeros((batch, length, length), bool)
    for b, s, t in np.ndindex(*visible.shape):
        near = t <= s and (window is None or t > s - window)
        visible[b, s, t] = near and segments[b, s] == segments[b, t] > 0
        if chunk is not None and visible[b, s, t]:
            start = np.flatnonzero(segments[b] == segments[b, s])[0]
            visible[b, s, t] = (s - start) // chunk == (t - start) // chunk
    return visible


SEGMENTS = np.array([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 0, 7, 7, 3, 3, 3, 1]], np.int32)


@pytest.mark.parametrize(
    ("window", "chunk"), [(None, None), (1, None), (3, None), (9, None), (100, None), (None, 2), (3, 4)]
)
def test_windows_chunks_and_segments(window, chunk):
    q, k, v = inputs(*SEGMENTS.shape)
    got = jax.jit(functools.partial(attend_causal, window=window, chunk=chunk))(q, k, v, jnp.asarray(SEGMENTS))
    visible = visible_by_hand(SEGMENTS, window, chunk)
    assert np.array_equal(causal(jnp.asarray(SEGMENTS), window, chunk), visible)
    real = SEGMENTS > 0
    assert relative(np.asarray(got)[real], by_hand(q, k, v, visible)[real]) < 1e-5
    assert np.isfinite(got).all()


def test_what_sees_nothing_is_finite_and_so_are_its_gradients():
    q, k, v = inputs(*SEGMENTS.shape)
    nowhere = jnp.full((3, 9), -1, jnp.int32)

    @jax.jit
    def run(q, k, v):
        out, pullback = jax.vjp(lambda *a: attend_places(*a, nowhere, nowhere), q, k, v)
        return out, pullback(jnp.ones_like(out))

    out, gradients = run(q, k, v)
    assert not out.any()
    assert not any(g.any() for g in gradients)


def rows(*places):
    return jnp.asarray(np.stack(places), jnp.int32)


LONG = 2 * QUERY_BLOCK + 44
RING = np.roll(np.where(np.arange(LONG) < 30, -1, np.arange(LONG)), 77)
CASES = {
    "over itself": (rows(np.arange(LONG)), rows(np.arange(LONG))),
    "padded": (rows(np.where(np.arange(LONG) < 200, np.arange(LONG), -1)), rows(np.arange(LONG))),
    "a chunk over a ring": (rows(np.arange(100, 100 + QUERY_BLOCK), np.arange(9, 9 + QUERY_BLOCK)), rows(RING, RING)),
    "a token over a long cache": (rows([KEY_BLOCK + 5], [3]), rows(*[np.arange(KEY_BLOCK + 40)] * 2)),
    "no block divides": (rows(np.arange(7, 7 + QUERY_BLOCK + 1)), rows(np.arange(QUERY_BLOCK + 9))),
}
PLAIN, WINDOW, CHUNK = {}, {"window": 40, "sinks": True, "packed": True}, {"chunk": 96, "packed": True}
RULED = [(case, WINDOW) for case in CASES]
RULED += [("padded", PLAIN), ("padded", CHUNK), ("a token over a long cache", PLAIN)]


@pytest.mark.parametrize(("case", "rule"), RULED)
def test_blocks_equal_all_at_once_and_so_do_their_gradients(case, rule):
    q_places, k_places = CASES[case]
    rng = np.random.default_rng(0)
    q = normal(rng, *q_places.shape, HEADS, WIDTH)
    k = normal(rng, len(k_places), GROUPS, k_places.shape[1], WIDTH)
    v = normal(rng, len(k_places), GROUPS, k_places.shape[1], WIDTH + 3)
    sinks = normal(rng, HEADS) if rule.get("sinks") else None
    packed = [places // 70 if rule.get("packed") else None for places in (q_places, k_places)]
    limits = rule.get("window"), rule.get("chunk")
    seen = visible(queries_at(q_places, packed[0], *limits), Keys(k_places, packed[1]))
    real = seen.any(-1)[..., None, None]
    cotangent = jnp.where(real, normal(rng, *q.shape[:3], v.shape[-1]), 0)

    def blocks(q, k, v, sinks):
        sight = {"q_segments": packed[0], "k_segments": packed[1], "window": limits[0], "chunk": limits[1]}
        return attend_places(q, k, v, q_places, k_places, sinks=sinks, **sight)

    def at_once(q, k, v, sinks):
        return attend(q, k, v, seen, sinks=sinks)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, *operands):
        out, pullback = jax.vjp(function, *operands)
        return jnp.where(real, out, 0), pullback(cotangent)

    got, want = (run(function, q, k, v, sinks) for function in (blocks, at_once))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


def test_half_precision_rounds_only_the_result():
    q, k, v = (a.astype(jnp.bfloat16) for a in inputs(2, 5))
    segments = jnp.ones((2, 5), jnp.int32)
    got = jax.jit(attend_causal)(q, k, v, segments)
    assert got.dtype == jnp.bfloat16
    want = by_hand(*(a.astype(jnp.float32) for a in (q, k, v)), visible_by_hand(segments, None))
    assert relative(got.astype(jnp.float32), want) < 2**-8


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(gradient):
    """Temporaries of a long sequence are far below its scores."""
    length = 2048

    def run(q, k, v):
        return attend_causal(q, k, v, jnp.ones((1, length), jnp.int32)).sum()

    program = jax.grad(run, (0, 1, 2)) if gradient else run
    operands = jax.eval_shape(lambda: inputs(1, length))
    memory = jax.jit(program).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * HEADS * length**2 / 16
