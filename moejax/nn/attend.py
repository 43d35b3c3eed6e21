"""Grouped-query attention over keys and values at hand: no parameters, no mesh, no cache."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.precision import precision_of
from moejax.sharding import pad_axis

QUERY_BLOCK = 512
"""Queries scored at once: bounds the scores to QUERY_BLOCK x S instead of S x S."""


def attend(
    q: Float[Array, "B S N H"], k: Float[Array, "B G T H"], v: Float[Array, "B G T H"], visible: Bool[Array, "B S T"]
) -> Float[Array, "B S N H"]:
    """Softmax attention of N query heads over G key/value heads, consecutive N / G heads sharing one.

    Scores and softmax are f32, probabilities are rounded to v's dtype, as transformers' eager attention does. A query
    that sees nothing (padding) gets the mean of all values: finite, and never used.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[1]
    precision = precision_of(q.dtype)
    q = q.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bsgih,bgth->bgist", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgist,bgth->bsgih", probabilities, v, precision=precision).reshape(batch, length, heads, width)


def attend_causal(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G S H"],
    v: Float[Array, "B G S H"],
    segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B S N H"]:
    """Attention of a sequence over itself: earlier tokens of the same segment, at most `window` of them with the token
    itself.

    Args:
      q, k, v: queries, keys and values of the same S tokens.
      segments: 0 is padding; attention stays within a segment.
      window: tokens seen, the token itself among them; None for all.
    """
    length = q.shape[1]
    if length <= QUERY_BLOCK:
        return attend(q, k, v, _visible(segments, segments, jnp.int32(0), window))
    blocks = -(-length // QUERY_BLOCK)

    def cut(x: jax.Array) -> jax.Array:
        x = pad_axis(x, 1, blocks * QUERY_BLOCK)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    def one(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        first, q_block, segments_block = block
        return attend(q_block, k, v, _visible(segments_block, segments, first, window))

    out = lax.map(one, (jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK, cut(q), cut(segments)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _visible(
    q_segments: Int[Array, "B Q"], k_segments: Int[Array, "B S"], first: Int[Array, ""], window: int | None
) -> Bool[Array, "B Q S"]:
    """Which keys each query sees, where query i is token `first + i`."""
    behind = (
        first
        + jnp.arange(q_segments.shape[1], dtype=jnp.int32)[:, None]
        - jnp.arange(k_segments.shape[1], dtype=jnp.int32)
    )
    near = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0) & near
