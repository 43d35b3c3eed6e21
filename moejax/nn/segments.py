"""Where packed sequences begin in their rows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def segment_starts(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The place of the first token of each token's segment.

    Padding belongs to the segment before it, which a hole in a mask does not end; padding at a row's start to none, and
    gives 0.
    """
    current = lax.associative_scan(lambda before, here: jnp.where(here > 0, here, before), segments, axis=1)
    previous = jnp.pad(current[:, :-1], [(0, 0), (1, 0)])
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return lax.cummax(jnp.where(current != previous, index, 0), axis=1)


def row_places(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Each token's place in its row, padding before the first segment counted; later segments start anew."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = segment_starts(segments)
    first = jnp.min(jnp.where(segments > 0, index, segments.shape[1]), axis=1, keepdims=True)
    return index - jnp.where(starts > first, starts, 0)
