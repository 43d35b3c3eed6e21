"""The key/value cache of one layer of grouped-query attention.

A layer keeps `size` places a row; the token at position p is in place p modulo size. A full-attention layer has a place
for every position; a layer with a window, or with chunks, only as many as that: old tokens are overwritten just when
they fall out of sight.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from moejax.kernels.rows import put_rows

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


@struct.dataclass
class Keys:
    """What a call's queries meet.

    Attributes:
      k, v: of tokens of the cache and of the call.
      positions: of each; -1 for places that hold none.
    """

    k: Float[Array, "B G T H"]
    v: Float[Array, "B G T H"]
    positions: Int[Array, "B T"]


def cache_size(window: int | None, max_len: int) -> int:
    """Places that a layer keeps for sequences of at most `max_len` tokens; `window` is its window or its chunk."""
    return max_len if window is None else min(window, max_len)


def extended(
    cache: LayerCache, k: Float[Array, "B S G H"], v: Float[Array, "B S G H"], positions: Int[Array, "B S"], ring: bool
) -> tuple[Keys, LayerCache]:
    """The cache with S more tokens a row, and the keys that these tokens may see.

    Several tokens can overwrite in a `ring` what the first of them still sees, so those see the ring as it was, with
    the new tokens behind it. One token overwrites only what has just fallen out of sight.
    """
    size = cache.k.shape[2]
    new = LayerCache(k=put(cache.k, k, positions), v=put(cache.v, v, positions))
    if k.shape[1] == 1 or not ring:
        return Keys(new.k, new.v, held(positions.max(1), size)), new
    before = held(positions[:, 0] - 1, size)
    k, v = (jnp.concatenate([old, jnp.swapaxes(a, 1, 2)], 2) for old, a in ((cache.k, k), (cache.v, v)))
    return Keys(k, v, jnp.concatenate([before, positions], 1)), new


def put(places: Float[Array, "B G C H"], new: Float[Array, "B S G H"], positions: Int[Array, "B S"]) -> jax.Array:
    """`places` with each row's last C tokens of `new` in theirs; what has the position -1 is left out."""
    return put_rows(places, new, place_of(positions, places.shape[2]))


def place_of(positions: Int[Array, "B S"], size: int) -> Int[Array, "B S"]:
    """Each token's place; `size`, which is none, for padding and for tokens that later ones of the call overwrite."""
    kept = (positions >= 0) & (positions > positions.max(1, keepdims=True) - size)
    return jnp.where(kept, positions % size, size)


def held(newest: Int[Array, " B"], size: int) -> Int[Array, "B C"]:
    """The position of the token in each place once the one at `newest` is there; -1 for places never filled."""
    behind = (newest[:, None] - jnp.arange(size, dtype=jnp.int32)) % size
    return jnp.maximum(newest[:, None] - behind, -1)
