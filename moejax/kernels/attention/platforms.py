"""Attention where it runs: the implementation of each platform, chosen when a program is lowered, and the gradient."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.kernels.attention import blockwise, native
from moejax.kernels.attention.sight import Keys, Queries
from moejax.kernels.device import choose, device_of, roomy
from moejax.sharding import alike

Saved: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Queries, Keys, jax.Array, jax.Array]


def attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    sinks: Float[Array, " N"] | None,
    queries: Queries,
    keys: Keys,
    scale: float,
) -> Float[Array, "B S N Hv"]:
    """Softmax attention, in v's dtype; differentiable in q, k, v and sinks.

    Args:
      q, k, v: N query heads over G key/value heads, consecutive N / G heads sharing one.
      sinks: a score for each head that takes part in the softmax and brings no value.
      queries, keys: who sees what; a query that sees nothing gets zeros.
      scale: of the scores.
    """
    return _traced_once(scale, *alike(q, k, v, sinks, queries, keys))


def attention_with_logs(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B G T H"],
    v: Float[Array, "B G T Hv"],
    queries: Queries,
    keys: Keys,
    scale: float,
) -> tuple[Float[Array, "B S N Hv"], Float[Array, "B S N"]]:
    """Attention to a part of the keys, and the f32 logarithm of each query's sum, by which parts are put together.

    Not differentiable.
    """
    out, saved = _forward(scale, *alike(q, k, v, None, queries, keys))
    return out, saved[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    queries: Queries,
    keys: Keys,
) -> jax.Array:
    return _forward(scale, q, k, v, sinks, queries, keys)[0]


def _forward(
    scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    queries: Queries,
    keys: Keys,
) -> tuple[jax.Array, Saved]:
    operands = (q, k, v, sinks, queries, keys)
    kernels = {
        "cpu": functools.partial(native.forward, scale=scale),
        "cuda": functools.partial(_on_cuda, scale=scale),
    }
    out, logs = choose(*operands, kernels=kernels, default=functools.partial(_in_blocks, scale=scale))
    return out, (*operands, out, logs)


def _on_cuda(*operands: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    from moejax.kernels.attention import triton

    return triton.forward(*operands, scale=scale, roomy=roomy(device_of(operands[0])))


def _in_blocks(*operands: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    values = operands[2]
    return lax.platform_dependent(
        *operands,
        cpu=functools.partial(blockwise.forward, scale=scale, dtype=jnp.float32),
        default=functools.partial(blockwise.forward, scale=scale, dtype=values.dtype),
    )


def _backward(scale: float, saved: Saved, dout: jax.Array) -> tuple:
    q, k, v, sinks, queries, keys, out, logs = saved
    dq, dk, dv = choose(
        *(q, k, v, queries, keys, out, logs, dout),
        kernels={"cpu": functools.partial(native.backward, scale=scale)},
        default=functools.partial(_gradients_in_blocks, scale=scale),
    )
    return dq, dk, dv, None if sinks is None else _sink_gradient(sinks, out, logs, dout), None, None


def _gradients_in_blocks(*operands: Any, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = operands[2]
    return lax.platform_dependent(
        *operands,
        cpu=functools.partial(blockwise.backward, scale=scale, dtype=jnp.float32),
        default=functools.partial(blockwise.backward, scale=scale, dtype=values.dtype),
    )


def _sink_gradient(sinks: jax.Array, out: jax.Array, logs: jax.Array, dout: jax.Array) -> jax.Array:
    """The share of each sink times what it takes from the values, which it adds nothing to."""
    taken = jnp.exp(sinks.astype(jnp.float32) - logs) * jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
    return -taken.sum((0, 1)).astype(sinks.dtype)


_attention.defvjp(_forward, _backward)

# Layers of one shape share what is traced and lowered, which takes longer than it takes to compile.
_traced_once = jax.jit(_attention, static_argnums=0)
