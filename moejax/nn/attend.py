"""Grouped-query attention over keys and values at hand: no parameters, no mesh, no cache.

One rule says who sees what (`attend_places`), so that whole sequences, prompts in chunks and decoded tokens over a
cache are one function.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.attention.platforms import attention
from moejax.kernels.attention.sight import Keys, queries_at
from moejax.nn.segments import segment_starts


def attend_places(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    q_places: Int[Array, "B S"],
    k_places: Int[Array, "B T"],
    *,
    q_segments: Int[Array, "B S"] | None = None,
    k_segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B S N Hv"]:
    """Softmax attention of N query heads over G key/value heads, consecutive N / G heads sharing one.

    A query sees the keys of its own segment at its own place and before, within the window and the chunk. Keys may be
    in any order, as in a ring. Blocks of keys that nobody sees are not read. Scores and softmax are f32. A query that
    sees nothing (padding) gets a finite result that is never used.

    Args:
      q, k, v: values may have a width of their own.
      q_places, k_places: of each token in its sequence; -1 for padding, and for a place of a cache that holds no token.
      q_segments, k_segments: both, or None where a row is one sequence.
      window: the most places seen, the query's own among them; None for all.
      chunk: queries see only places of their own chunk of this many; None for no chunks.
      scale: of the scores; None is 1 / sqrt(H).
      sinks: a score for each head that takes part in the softmax and brings no value.

    Returns:
      In v's dtype. Differentiable in q, k, v and sinks, with memory for one pair of blocks of scores.
    """
    queries, keys = queries_at(q_places, q_segments, window, chunk), Keys(k_places, k_segments)
    return attention(q, k, v, sinks, queries, keys, q.shape[-1] ** -0.5 if scale is None else scale)


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
      scale, sinks: as `attend_places` takes them.
    """
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    if chunk is not None:
        places = places - segment_starts(segments)
    places = jnp.where(segments > 0, places, -1)
    return attend_places(
        q,
        k,
        v,
        places,
        places,
        q_segments=segments,
        k_segments=segments,
        window=window,
        chunk=chunk,
        scale=scale,
        sinks=sinks,
    )
