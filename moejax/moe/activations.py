"""What a gated MLP makes of its two projections."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import Activation, ActivationName, ClampedSwiGLU


def activate(gate: Float[Array, "*T F"], up: Float[Array, "*T F"], activation: Activation) -> Float[Array, "*T F"]:
    """The hidden values, in the dtype of gate and up; zero where both are, as in columns that padding added.

    A named nonlinearity is computed in f32, rounded, then multiplied with up; ClampedSwiGLU is f32 throughout.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; for ClampedSwiGLU `GptOssExperts` of transformers.
    """
    if not isinstance(activation, ClampedSwiGLU):
        return named_activation(gate, activation) * up
    alpha, limit = activation.alpha, activation.limit
    wide = jnp.minimum(gate.astype(jnp.float32), limit)
    up_wide = jnp.clip(up.astype(jnp.float32), -limit, limit)
    return ((up_wide + 1) * wide * jax.nn.sigmoid(alpha * wide)).astype(gate.dtype)


def named_activation(x: Float[Array, "*T F"], name: ActivationName) -> Float[Array, "*T F"]:
    """A nonlinearity computed in f32 and returned in x's dtype."""
    wide = x.astype(jnp.float32)
    match name:
        case "silu":
            out = jax.nn.silu(wide)
        case "gelu":
            out = jax.nn.gelu(wide, approximate=False)
        case "gelu_tanh":
            out = jax.nn.gelu(wide, approximate=True)
        case "relu":
            out = jax.nn.relu(wide)
    return out.astype(x.dtype)
