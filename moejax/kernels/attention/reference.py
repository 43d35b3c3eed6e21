"""The oracle: all scores at once, and a table of who sees whom."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.nn.segments import segment_starts
from moejax.precision import precision_of


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


def causal(segments: Int[Array, "B S"], window: int | None = None, chunk: int | None = None) -> Bool[Array, "B S S"]:
    """What each token of a sequence sees of it: earlier tokens of its segment, and itself.

    Args:
      segments: 0 is padding, which sees nothing.
      window: the most tokens seen, the token itself among them; None for all.
      chunk: tokens see only their own chunk of this many places, counted from the segment's first; None for no chunks.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    behind = index[:, None] - index
    near = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    alike = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    if chunk is not None:
        chunks = (index - segment_starts(segments)) // chunk
        alike &= chunks[:, :, None] == chunks[:, None]
    return alike & near


def _softmax(scores: Float[Array, "B G I S T"], sinks: Float[Array, " N"] | None) -> Float[Array, "B G I S T"]:
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(1, scores.shape[1], scores.shape[2], 1, 1)
    largest = lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sink))
    powers = jnp.exp(scores - largest)
    return powers / (powers.sum(-1, keepdims=True) + jnp.exp(sink - largest))
