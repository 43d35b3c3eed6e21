"""The native handler, by every instruction set of this processor, against the blocks in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal, relative

from moejax.kernels.attention import blockwise, native
from moejax.kernels.attention.sight import Keys, queries_at, visible
from moejax.kernels.native.library import instruction_sets

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="needs a C++ compiler")

# Rows, queries, keys, query heads, key/value heads, widths.
SHAPES = {
    "a token over a ring": (2, 1, 700, 4, 2, 16, 16),
    "odd widths, six heads share a key": (1, 7, 300, 6, 1, 25, 41),
    "more heads than a task takes": (2, 1, 90, 40, 1, 36, 36),
    "fewer keys than queries": (3, 16, 9, 4, 2, 6, 6),
    "several blocks of queries and of keys": (1, 200, 530, 2, 1, 16, 16),
}
RULES = [{}, {"window": 50, "sinks": True}, {"chunk": 64, "segments": True}]


def case(shape, rule, dtype):
    """Places as in a ring with a few empty places, and padding among the queries."""
    rows, length, room, heads, groups, width, value = SHAPES[shape]
    rng = np.random.default_rng(0)
    shapes = ((rows, length, heads, width), (rows, groups, room, width), (rows, groups, room, value), (heads,))
    q, k, v, sinks = (normal(rng, *s).astype(dtype) for s in shapes)
    k_places = np.roll(np.where(np.arange(room) < 5, -1, np.arange(room)), room // 3)
    q_places = np.maximum(np.arange(room - length, room), -1)
    q_places, k_places = (jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1)) for x in (q_places, k_places))
    q_segments, k_segments = (x // 40 + 1 if rule.get("segments") else None for x in (q_places, k_places))
    queries = queries_at(q_places, q_segments, rule.get("window"), rule.get("chunk"))
    return q, k, v, sinks if rule.get("sinks") else None, queries, Keys(k_places, k_segments)


@pytest.mark.parametrize("isa", range(len(instruction_sets())), ids=instruction_sets())
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_blocks(shape, rule, isa):
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)):
        operands = case(shape, rule, dtype)
        real = np.asarray(visible(*operands[4:]).any(-1))
        run = functools.partial(native.forward, scale=0.3, isa=isa)
        (got, logs), (want, want_logs) = jax.jit(run)(*operands), blocks(operands)
        assert got.dtype == dtype
        got, want = (np.asarray(x, np.float32)[real] for x in (got, want))
        assert relative(got, want) < bound
        assert relative(np.asarray(logs)[real], np.asarray(want_logs)[real]) < bound
        assert np.isfinite(logs).all()


@pytest.mark.parametrize("isa", range(len(instruction_sets())), ids=instruction_sets())
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_blocks(shape, rule, isa):
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)):
        q, k, v, sinks, queries, keys = case(shape, rule, dtype)
        out, logs = blocks((q, k, v, sinks, queries, keys))
        dout = normal(np.random.default_rng(1), *out.shape).astype(dtype)
        operands = (q, k, v, queries, keys, out, logs, dout)
        got = jax.jit(functools.partial(native.backward, scale=0.3, isa=isa))(*operands)
        want = gradients_of_blocks(*operands)
        for name, a, b, like in zip("qkv", got, want, (q, k, v), strict=True):
            assert a.dtype == dtype and a.shape == like.shape
            assert relative(a.astype(jnp.float32), b.astype(jnp.float32)) < bound, name


@jax.jit
def gradients_of_blocks(*operands):
    return blockwise.backward(*operands, scale=0.3, dtype=jnp.float32)


@jax.jit
def blocks(operands):
    return blockwise.forward(*operands, scale=0.3, dtype=jnp.float32)


@pytest.mark.parametrize("run", [native.forward, functools.partial(blockwise.forward, dtype=jnp.float32)])
def test_keys_that_nobody_sees_are_not_read(run):
    """What lies past the filled part of a cache, and before a window, may be anything."""
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, 1, 2, 8), normal(rng, 1, 1, 8192, 8), normal(rng, 1, 1, 8192, 8)
    k, v = (x.at[:, :, :3072].set(jnp.nan).at[:, :, 5120:].set(jnp.nan) for x in (k, v))
    places = jnp.arange(8192, dtype=jnp.int32)[None]
    places = jnp.where(places < 4200, places, -1)
    queries = queries_at(jnp.array([[4199]], jnp.int32), None, 100, None)
    out, _ = jax.jit(functools.partial(run, scale=1.0))(q, k, v, None, queries, Keys(places, None))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("isa", range(len(instruction_sets())), ids=instruction_sets())
def test_what_is_no_number_is_not_swallowed(isa):
    """A query of NaN gives NaN, as its products do; those beside it stay as they were."""
    q, *others = case("several blocks of queries and of keys", {}, jnp.float32)
    out, _ = jax.jit(functools.partial(native.forward, scale=0.3, isa=isa))(q.at[0, 150, 0, 3].set(jnp.nan), *others)
    nan = np.isnan(out)
    assert nan[0, 150, 0].all()
    assert nan.sum() == nan[0, 150, 0].size
