"""Tokens that come a few at a time see what attention over the whole history shows them, rings or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import normal, relative

from moejax.kernels.attention.reference import attend
from moejax.nn.attend import attend_places
from moejax.nn.cache import LayerCache, cache_size, extended, held, put
from moejax.nn.places import chunk_positions

LENGTHS = [1, 9, 23, 14]
BATCH, LONGEST, GROUPS, WIDTH = len(LENGTHS), 23, 2, 4


def history(seed):
    """Queries, keys and values of every position of every row."""
    rng = np.random.default_rng(seed)
    q = normal(rng, BATCH, LONGEST, 4, WIDTH)
    return q, normal(rng, BATCH, LONGEST, GROUPS, WIDTH), normal(rng, BATCH, LONGEST, GROUPS, WIDTH)


def empty(size):
    zeros = jnp.full((BATCH, GROUPS, size, WIDTH), 1e4)  # what an empty place holds must never be seen
    return LayerCache(zeros, zeros)


@pytest.mark.parametrize("size", [1, 3, 8, LONGEST])
@pytest.mark.parametrize(
    ("window", "chunk"), [(None, None), (1, None), (4, None), (9, None), (64, None), (None, 5), (None, 8)]
)
def test_tokens_see_what_the_whole_history_shows_them(window, chunk, size):
    """Rows of several lengths, `size` tokens at a time; what stands past a row's end changes nothing."""
    places = cache_size(window or chunk, LONGEST)
    assert places == min(window or chunk or LONGEST, LONGEST)
    q, k, v = history(window or 0)
    lengths = jnp.array(LENGTHS, jnp.int32)

    @jax.jit
    def step(cache, q, k, v, positions):
        keys, cache = extended(cache, k, v, positions, ring=(window or chunk) is not None)
        return attend_places(q, keys.k, keys.v, positions, keys.positions, window=window, chunk=chunk), cache

    cache, outs = empty(places), []
    for first in range(0, LONGEST, size):
        part = [jnp.pad(a, ((0, 0), (0, size), (0, 0), (0, 0)))[:, first : first + size] for a in (q, k, v)]
        out, cache = step(cache, *part, chunk_positions(first, size, lengths))
        outs.append(out)
    got = np.asarray(jnp.concatenate(outs, 1))

    at = np.arange(LONGEST)
    seen = at[:, None] >= at
    seen &= at[:, None] - at < (window or LONGEST)
    seen &= at[:, None] // (chunk or LONGEST) == at // (chunk or LONGEST)
    want = np.asarray(attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(np.repeat(seen[None], BATCH, 0))))
    for row, length in enumerate(LENGTHS):
        assert relative(got[row, :length], want[row, :length]) < 1e-5, row


def test_token_at_position_p_is_in_place_p_modulo_size():
    k = jnp.arange(7, dtype=jnp.float32)[None, :, None, None]
    ring = put(jnp.zeros((1, 1, 4, 1)), k, chunk_positions(0, 7, jnp.array([6], jnp.int32)))
    assert ring[0, 0, :, 0].tolist() == [4, 5, 2, 3]
    assert held(jnp.array([5], jnp.int32), 4).tolist() == [[4, 5, 2, 3]]
    ring = put(ring, jnp.full((1, 1, 1, 1), 6.0), jnp.array([[6]], jnp.int32))
    assert ring[0, 0, :, 0].tolist() == [4, 5, 6, 3]
    assert held(jnp.array([1], jnp.int32), 4).tolist() == [[0, 1, -1, -1]]


def test_padding_leaves_every_place_as_it_is():
    ring = jnp.arange(3, dtype=jnp.float32)[None, None, :, None]
    assert put(ring, jnp.full((1, 5, 1, 1), 9.0), jnp.full((1, 5), -1, jnp.int32)).tolist() == ring.tolist()
