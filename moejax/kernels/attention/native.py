"""Few queries over many keys on CPU by the native handler, which reads just the keys that are seen, where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.kernels import native
from moejax.kernels.attention.blocks import LOW
from moejax.kernels.attention.sight import Keys, Queries
from moejax.kernels.native.calls import BEST
from moejax.sharding import varying_as

FEW = 16
"""Queries. More are a prompt, whose products XLA does as well in blocks."""


def suits(q: Float[Array, "B S N H"], queries: Queries) -> bool:
    """Whether the handler takes these: few queries of unpacked rows, float32 or bfloat16, and it works here."""
    few = q.shape[1] <= FEW and queries.segments is None
    return few and q.dtype in (jnp.float32, jnp.bfloat16) and native.available()


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
    heads = q.shape[2]
    sinks = jnp.full((heads,), LOW) if sinks is None else sinks.astype(jnp.float32)
    results = _result((*q.shape[:3], v.shape[3]), v.dtype, q), _result(q.shape[:3], jnp.float32, q)
    call = jax.ffi.ffi_call("moejax_attention", results)
    operands = (q, k, v, varying_as(sinks, q), queries.first, queries.last, keys.places)
    out, logs = call(*operands, scale=np.float32(scale), isa=np.int64(isa))
    return out, logs


def _result(shape: tuple[int, ...], dtype: DTypeLike, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A result that inside shard_map differs along the axes along which `like` does."""
    kind = jax.typeof(like)
    # JAX takes the mark of what differs only beside the mesh that it refers to.
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec()) if kind.manual_axis_type.varying else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=kind.manual_axis_type)
