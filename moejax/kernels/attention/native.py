"""Attention on CPU by the native handler, which reads just the keys that are seen, once, where they lie."""

import jax
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
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    results = ((*q.shape[:3], v.shape[3]), v.dtype), (q.shape[:3], jnp.float32)
    operands = (q, k, v, sinks, *_sight(queries, keys))
    out, logs = call("moejax_attend", results, *operands, scale=np.float32(scale), isa=isa)
    return out, logs


def backward(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    queries: Queries,
    keys: Keys,
    out: Float[Array, "B S N Hv"],
    logs: Float[Array, "B S N"],
    dout: Float[Array, "B S N Hv"],
    *,
    scale: float,
    isa: int = BEST,
) -> tuple[Float[Array, "B S N H"], Float[Array, "B G T H"], Float[Array, "B G T Hv"]]:
    """What `blockwise.backward` returns, from the same arguments; products are of operands of the dtype of q, k, v."""
    operands = (q, k, v, *_sight(queries, keys), out, logs, dout)
    results = tuple((x.shape, x.dtype) for x in (q, k, v))
    dq, dk, dv = call("moejax_attend_gradient", results, *operands, scale=np.float32(scale), isa=isa)
    return dq, dk, dv


def _sight(queries: Queries, keys: Keys) -> tuple[jax.Array, ...]:
    """Who sees what, as the handlers take it; segments are empty where all are of one."""
    q_segments, k_segments = queries.segments, keys.segments
    if q_segments is None or k_segments is None:
        q_segments = k_segments = jnp.zeros((0, 0), jnp.int32)
    return queries.first, queries.last, q_segments, keys.places, k_segments
