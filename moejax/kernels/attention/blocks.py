"""Cutting queries and keys into blocks, and leaving out pairs of blocks of which no query sees a key."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from moejax.kernels.attention.sight import NOWHERE, Keys, Queries
from moejax.sharding import pad_axis, round_up

QUERY_BLOCK = 128
"""Queries scored at once. 128 x 128 and 256 x 256 scores a head measured best on CPU, 512 x 512 two times slower."""

KEY_BLOCK = 1024
"""Keys scored at once at most, when queries are few."""

LOW = -1e30
"""Below every score. Hidden scores are lower still, so that their powers are zero even where all are hidden."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of S queries and T keys."""

    queries: int
    keys: int

    @classmethod
    def of(cls, queries: int, keys: int) -> "Blocks":
        """With about QUERY_BLOCK squared scores a head in each pair of blocks."""
        rows = min(queries, QUERY_BLOCK)
        return cls(rows, min(keys, KEY_BLOCK, QUERY_BLOCK * QUERY_BLOCK // rows))


def query_blocks(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    """`x` with its `axis` in blocks of `size`, the last one filled up by `value`, and the blocks in front."""
    x = pad_axis(x, axis, round_up(x.shape[axis], size), value)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def whole(blocks: jax.Array, axis: int, length: int) -> jax.Array:
    """What `query_blocks` cut, put together again."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def blocks_of_queries(queries: Queries, size: int) -> Queries:
    """The vectors in blocks, in front; what fills up the last one sees nothing."""
    first, last, segments = queries
    cut = query_blocks
    return Queries(
        cut(first, 1, size, NOWHERE), cut(last, 1, size, -1), None if segments is None else cut(segments, 1, size)
    )


def key_block(x: jax.Array, axis: int, i: jax.Array, size: int) -> jax.Array:
    """Block i. The last one begins earlier when `size` does not divide: padding would copy the whole cache."""
    return lax.dynamic_slice_in_dim(x, _start(i, size, x.shape[axis]), size, axis)


def block_of_keys(keys: Keys, i: jax.Array, size: int) -> Keys:
    """The vectors of block i, without the places of keys that the block before has too."""
    index = _start(i, size, keys.places.shape[1]) + jnp.arange(size, dtype=jnp.int32)
    places = jnp.where(index < i * size, -1, key_block(keys.places, 1, i, size))
    return Keys(places, None if keys.segments is None else key_block(keys.segments, 1, i, size))


def _start(i: jax.Array, size: int, length: int) -> jax.Array:
    return jnp.minimum(i * size, length - size)


def spans(queries: Queries, keys: Keys, blocks: Blocks) -> tuple[Int[Array, " I"], Int[Array, " I"]]:
    """For each block of queries the first block of keys that some query of some row may see, and one past the last."""
    return _ends_of(_live(queries, keys, blocks).any(axis=-1))


def row_spans(queries: Queries, keys: Keys, blocks: Blocks) -> tuple[Int[Array, "I B"], Int[Array, "I B"]]:
    """The same for each row by itself."""
    return _ends_of(_live(queries, keys, blocks))


def _ends_of(live: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Along axis 1 the first that is true and one past the last; nothing where none is."""
    first = jnp.argmax(live, axis=1).astype(jnp.int32)
    past = live.shape[1] - jnp.argmax(live[:, ::-1], axis=1).astype(jnp.int32)
    return first, jnp.where(live.any(axis=1), past, first)


def _live(queries: Queries, keys: Keys, blocks: Blocks) -> Bool[Array, "I J B"]:
    """Pairs of blocks that may hold a visible pair, judged by the ends of their places and segments."""

    def lowest(x: jax.Array, size: int) -> jax.Array:
        return query_blocks(x, 1, size, NOWHERE).min(-1)

    def highest(x: jax.Array, size: int) -> jax.Array:
        return query_blocks(x, 1, size, -1).max(-1)

    q, k = blocks.queries, blocks.keys
    live = lowest(queries.first, q)[:, None] <= highest(keys.places, k)
    live &= lowest(jnp.where(keys.places < 0, NOWHERE, keys.places), k) <= highest(queries.last, q)[:, None]
    if queries.segments is not None and keys.segments is not None:
        live &= lowest(queries.segments, q)[:, None] <= highest(keys.segments, k)
        live &= lowest(keys.segments, k) <= highest(queries.segments, q)[:, None]
    return live
