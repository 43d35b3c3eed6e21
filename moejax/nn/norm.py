"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*T D"]:
    """`weight * x / sqrt(mean(x^2) + eps)`; the mean in f32, the product in x's dtype as transformers has it.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """
    return scaled(x, jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True), weight, eps)


def scaled(x: jax.Array, mean_square: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The normalisation with its mean of squares (f32) already known; a model cut over devices sums it from parts."""
    return weight * (x.astype(jnp.float32) * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
