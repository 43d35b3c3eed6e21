"""What a gated MLP makes of its two projections."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import Activation, ClampedSwiGLU


def activate(gate: Float[Array, "*T F"], up: Float[Array, "*T F"], activation: Activation) -> Float[Array, "*T F"]:
    """The hidden values, in the dtype of gate and up; zero where both are, as in columns that padding added.

    A named nonlinearity is computed in f32, rounded, then multiplied with up; ClampedSwiGLU is f32 throughout.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; for ClampedSwiGLU `GptOssExperts` of transformers.
    """
    wide = gate.astype(jnp.float32)
    match activation:
        case "silu":
            nonlinear = jax.nn.silu(wide)
        case "gelu":
            nonlinear = jax.nn.gelu(wide, approximate=False)
        case "gelu_tanh":
            nonlinear = jax.nn.gelu(wide, approximate=True)
        case "relu":
            nonlinear = jax.nn.relu(wide)
        case ClampedSwiGLU(alpha, limit):
            wide = jnp.minimum(wide, limit)
            up_wide = jnp.clip(up.astype(jnp.float32), -limit, limit)
            return ((up_wide + 1) * wide * jax.nn.sigmoid(alpha * wide)).astype(gate.dtype)
    return nonlinear.astype(gate.dtype) * up
