"""Attention on CPU by the native handler, which reads just the keys that are seen, once, where they lie."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.kernels.attention.sight import Keys, Queries
from moejax.kernels.native.ffi import BEST, call


def forward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    sinks: Float[Array, " N"] | None,
    queries: Queries,
    keys: Keys,
    *,
    scale: float,
    isa: int = BEST,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B S N"]]:
    """What `blockwise.forward` returns, from the same arguments; tests choose an instruction set by its index `isa`."""
    q_segments, k_segments = queries.segments, keys.segments
    if q_segments is None or k_segments is None:
        q_segments = k_segments = jnp.zeros((0, 0), jnp.int32)
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    vectors = (sinks, queries.first, queries.last, q_segments, keys.places, k_segments)
    results = ((*q.shape[:3], v.shape[3]), v.dtype), (q.shape[:3], jnp.float32)
    out, logs = call("moejax_attend", results, q, k, v, *vectors, scale=np.float32(scale), isa=isa)
    return out, logs
