"""Where a routing weight multiplies: what comes out of an expert or, with `scales_input`, what goes in."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.moe.strategies.local import Local


def weigh_inputs(
    rows: Float[Array, "M d"], weights: Float[Array, "T K"], pair: Int[Array, " M"], local: Local
) -> Float[Array, "M d"]:
    """The rows as their experts want them; `pair` says which weight each row has, 0 where it is past the last one."""
    if not local.scales_input:
        return rows
    factors = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return (rows.astype(jnp.float32) * factors[:, None]).astype(rows.dtype)


def combine(outputs: Float[Array, "T K d"], weights: Float[Array, "T K"], local: Local) -> Float[Array, "T d"]:
    """The sum over each token's experts, f32 inside; outputs of pairs that went nowhere are zeros."""
    weights = jnp.ones_like(weights) if local.scales_input else weights
    y = jnp.einsum("tkd,tk->td", outputs.astype(jnp.float32), weights, precision=lax.Precision.HIGHEST)
    return y.astype(outputs.dtype)
