"""Normalisation, computed in f32: root mean square in its variants, and LayerNorm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.config import NormConfig
from moejax.sharding import AnyMesh, sharded_param


class Norm(nnx.Module):
    """A norm over the model width with its learned parameters: `weight [D]` and, for LayerNorm, `bias [D]`."""

    def __init__(self, config: NormConfig, width: int, *, mesh: AnyMesh, dtype: DTypeLike):
        """Neutral weights."""
        self.config = config
        self.weight = sharded_param(neutral(config, (width,), dtype), mesh, None)
        self.bias = sharded_param(jnp.zeros(width, dtype), mesh, None) if config.kind == "layer" else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return normalise(x, self.config, self.weight[...], None if self.bias is None else self.bias[...])


def normalise(
    x: Float[Array, "*T D"], norm: NormConfig, weight: Float[Array, " D"], bias: Float[Array, " D"] | None = None
) -> Float[Array, "*T D"]:
    """`weight * x / sqrt(mean(x^2) + eps)` in the variant that `norm` says; in x's dtype.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; Ba et al. 2016, "Layer
    Normalization", for `kind` "layer".
    """
    if norm.kind != "layer":
        return scaled(x, _mean_square(x), norm, weight)
    assert bias is not None
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(_mean_square(centred) + norm.eps)
    return (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*T D"]:
    """The plain variant of `normalise`."""
    return normalise(x, NormConfig(eps), weight)


def unit_norm(x: Float[Array, "*T D"], eps: float) -> Float[Array, "*T D"]:
    """`x / sqrt(mean(x^2) + eps)`, without a weight."""
    return (x.astype(jnp.float32) * jax.lax.rsqrt(_mean_square(x) + eps)).astype(x.dtype)


def scaled(x: jax.Array, mean_square: jax.Array, norm: NormConfig, weight: jax.Array) -> jax.Array:
    """The normalisation with its mean of squares (f32) already known; a model cut over devices sums it from parts."""
    y = x.astype(jnp.float32) * jax.lax.rsqrt(mean_square + norm.eps)
    if norm.kind == "rms":
        return weight * y.astype(x.dtype)
    factor = weight.astype(jnp.float32) + (1.0 if norm.kind == "rms_plus_one" else 0.0)
    return (factor * y).astype(x.dtype)


def neutral(norm: NormConfig, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Weights that change nothing."""
    return jnp.full(shape, 0.0 if norm.kind == "rms_plus_one" else 1.0, dtype)


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
