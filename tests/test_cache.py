"""A ring of the last tokens gives what attention over the whole history gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal, relative

from moejax.kernels.attention.reference import attend
from moejax.nn.attend import attend_places
from moejax.nn.cache import appended, cache_size, filled, held

PROMPT, STEPS, GROUPS, WIDTH = 9, 14, 2, 4
LENGTHS = [1, 4, 9, 5]
BATCH, LONGEST = len(LENGTHS), PROMPT + STEPS


def history(seed):
    """Queries, keys and values of every position of every row."""
    rng = np.random.default_rng(seed)
    q = normal(rng, BATCH, LONGEST, 4, WIDTH)
    return q, normal(rng, BATCH, GROUPS, LONGEST, WIDTH), normal(rng, BATCH, GROUPS, LONGEST, WIDTH)


def at(x, positions, axis):
    """Each row's entry at its own position."""
    return jnp.stack([jax.lax.dynamic_slice_in_dim(x[b], positions[b], 1, axis - 1) for b in range(BATCH)])


@pytest.mark.parametrize("window", [None, 1, 4, 6, PROMPT, 64])
def test_every_step_sees_what_the_window_shows(window):
    size = cache_size(window, LONGEST)
    assert size == min(window or LONGEST, LONGEST)
    q, k, v = history(window or 0)
    lengths = jnp.array(LENGTHS, jnp.int32)

    @jax.jit
    def step(cache, positions):
        cache = appended(cache, at(k, positions, 2), at(v, positions, 2), positions)
        places = held(positions, size)
        out = attend_places(at(q, positions, 1), cache.k, cache.v, positions[:, None], places, window=window)
        return cache, out

    @jax.jit
    def whole_history(positions):
        behind = positions[:, None] - jnp.arange(LONGEST, dtype=jnp.int32)
        visible = (behind >= 0) & (behind < (window or LONGEST))
        return attend(at(q, positions, 1), k, v, visible[:, None])

    # Past a row's length the prompt holds what must never be seen.
    real = jnp.arange(PROMPT) < lengths[:, None]
    prompt = (jnp.where(real[:, None, :, None], a[:, :, :PROMPT], 1e4) for a in (k, v))
    cache = filled(*prompt, lengths, size)
    assert cache.k.shape == cache.v.shape == (BATCH, GROUPS, size, WIDTH)
    for i in range(STEPS):
        cache, got = step(cache, lengths + i)
        assert relative(got, whole_history(lengths + i)) < 1e-5, i


def test_token_at_position_p_is_in_place_p_modulo_size():
    k = jnp.arange(7, dtype=jnp.float32)[None, None, :, None]
    cache = filled(k, k, jnp.array([6], jnp.int32), 4)
    assert cache.k[0, 0, :, 0].tolist() == [4, 5, 2, 3]
    cache = appended(cache, jnp.full((1, 1, 1, 1), 6.0), jnp.full((1, 1, 1, 1), 6.0), jnp.array([6], jnp.int32))
    assert cache.k[0, 0, :, 0].tolist() == [4, 5, 6, 3]
    assert held(jnp.array([6], jnp.int32), 4).tolist() == [[4, 5, 6, 3]]
    assert held(jnp.array([2], jnp.int32), 4).tolist() == [[0, 1, 2, -1]]
