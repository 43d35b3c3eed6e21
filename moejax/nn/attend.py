"""Grouped-query attention over keys and values at hand: no parameters, no mesh, no cache."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.nn.segments import segment_starts
from moejax.precision import precision_of
from moejax.sharding import pad_axis

QUERY_BLOCK = 512
"""Queries scored at once: bounds the scores to QUERY_BLOCK x S instead of S x S."""


def attend(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    visible: Bool[Array, "B S T"],
    *,
    scale: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B S N Hv"]:
    """Softmax attention of N query heads over G key/value heads, consecutive N / G heads sharing one.

    Scores and softmax are f32, probabilities are rounded to v's dtype, as transformers' eager attention does. A query
    that sees nothing (padding) gets a finite result that is never used.

    Args:
      q, k, v: values may have a width of their own.
      visible: which keys each query sees.
      scale: of the scores; None is 1 / sqrt(H).
      sinks: a score for each head that takes part in the softmax and brings no value.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[1]
    precision = precision_of(q.dtype)
    q = q.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("bsgih,bgth->bgist", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (width**-0.5 if scale is None else scale)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = _softmax(scores, sinks).astype(v.dtype)
    out = jnp.einsum("bgist,bgth->bsgih", probabilities, v, precision=precision)
    return out.reshape(batch, length, heads, v.shape[-1])


def attend_causal(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G S H"],
    v: Float[Array, "B G S Hv"],
    segments: Int[Array, "B S"],
    window: int | None = None,
    *,
    chunk: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B S N Hv"]:
    """Attention of a sequence over itself: earlier tokens of the same segment, and the token itself.

    Args:
      q, k, v: queries, keys and values of the same S tokens.
      segments: 0 is padding; attention stays within a segment.
      window: the most tokens seen, the token itself among them; None for all.
      chunk: tokens see only their own chunk of this many places, counted from the segment's first; None for no chunks.
      scale, sinks: as `attend` takes them.
    """
    length = q.shape[1]
    marks = _marks(segments, chunk)
    if length <= QUERY_BLOCK:
        return attend(q, k, v, _visible(marks, marks, jnp.int32(0), window), scale=scale, sinks=sinks)
    blocks = -(-length // QUERY_BLOCK)

    def cut(x: jax.Array) -> jax.Array:
        x = pad_axis(x, 1, blocks * QUERY_BLOCK)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    def one(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        first, q_block, marks_block = block
        return attend(q_block, k, v, _visible(marks_block, marks, first, window), scale=scale, sinks=sinks)

    out = lax.map(one, (jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK, cut(q), cut(marks)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :length]


def _marks(segments: Int[Array, "B S"], chunk: int | None) -> Int[Array, "B S M"]:
    """What must be equal for one token to see another: the segment, and with chunks the number of the chunk."""
    if chunk is None:
        return segments[..., None]
    behind = jnp.arange(segments.shape[1], dtype=jnp.int32) - segment_starts(segments)
    return jnp.stack([segments, behind // chunk], axis=-1)


def _softmax(scores: Float[Array, "B G I S T"], sinks: Float[Array, " N"] | None) -> Float[Array, "B G I S T"]:
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(1, scores.shape[1], scores.shape[2], 1, 1)
    largest = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
    powers = jnp.exp(scores - largest)
    return powers / (powers.sum(-1, keepdims=True) + jnp.exp(sink - largest))


def _visible(
    q_marks: Int[Array, "B Q M"], k_marks: Int[Array, "B S M"], first: Int[Array, ""], window: int | None
) -> Bool[Array, "B Q S"]:
    """Which keys each query sees, where query i is token `first + i`."""
    queries = first + jnp.arange(q_marks.shape[1], dtype=jnp.int32)[:, None]
    behind = queries - jnp.arange(k_marks.shape[1], dtype=jnp.int32)
    near = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    alike = (q_marks[:, :, None] == k_marks[:, None, :]).all(-1)
    return alike & (k_marks[:, None, :, 0] > 0) & near
