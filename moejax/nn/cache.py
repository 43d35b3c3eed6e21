"""The key/value cache of one layer of grouped-query attention.

A layer keeps `size` places a row; the token at position p is in place p modulo size. A full-attention layer has a place
for every position; a layer with a window, or with chunks, only as many as that: old tokens are overwritten just when
they fall out of sight.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from moejax.sharding import pad_axis

Cache: TypeAlias = PyTree
"""What any kind of layer keeps of the tokens so far; its mixer makes it and alone knows its form."""


@struct.dataclass
class LayerCache:
    """Keys (already turned by their rotary angles) and values, in the model's dtype.

    Attributes:
      k, v: one place for each position held.
    """

    k: Float[Array, "B G C H"]
    v: Float[Array, "B G C H"]


def cache_size(window: int | None, max_len: int) -> int:
    """Places that a layer keeps for sequences of at most `max_len` tokens; `window` is its window or its chunk."""
    return max_len if window is None else min(window, max_len)


def filled(k: Float[Array, "B G S H"], v: Float[Array, "B G S H"], lengths: Int[Array, " B"], size: int) -> LayerCache:
    """The cache after right-padded prompts: the last `size` of each row's `lengths` tokens, each in its place."""
    if k.shape[2] <= size:
        return LayerCache(k=pad_axis(k, 2, size), v=pad_axis(v, 2, size))
    last = lengths[:, None] - 1
    position = last - (last - jnp.arange(size, dtype=jnp.int32)) % size
    index = jnp.maximum(position, 0)[:, None, :, None]
    return LayerCache(k=jnp.take_along_axis(k, index, 2), v=jnp.take_along_axis(v, index, 2))


def appended(
    cache: LayerCache, k: Float[Array, "B G 1 H"], v: Float[Array, "B G 1 H"], positions: Int[Array, " B"]
) -> LayerCache:
    """The cache with one more token a row, at that row's position."""
    place = positions % cache.k.shape[2]
    return LayerCache(k=put_rows(cache.k, k, place), v=put_rows(cache.v, v, place))


def put_rows(places: jax.Array, new: jax.Array, at: Int[Array, " B"]) -> jax.Array:
    """`places [B, G, C, H]` with `new [B, G, 1, H]` at each row's own place."""
    return jax.vmap(lambda row, value, i: lax.dynamic_update_slice_in_dim(row, value, i, 1))(places, new, at)


def held(newest: Int[Array, " B"], size: int) -> Int[Array, "B C"]:
    """The position of the token in each place once the one at `newest` is there; -1 for places never filled."""
    behind = (newest[:, None] - jnp.arange(size, dtype=jnp.int32)) % size
    return jnp.maximum(newest[:, None] - behind, -1)
