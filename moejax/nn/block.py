"""One decoder layer: a mixer and a mixture of experts (or a dense MLP), each after a norm and added to the stream."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from moejax.moe.layer import MoE, MoEDetails, Parallel
from moejax.nn.attention import Attention
from moejax.nn.cache import Cache
from moejax.nn.latent_attention import LatentAttention
from moejax.nn.mlp import DenseMLP
from moejax.nn.norm import Norm
from moejax.nn.places import Places
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh

MIXERS: dict[type, Any] = {AttentionConfig: Attention, LatentAttentionConfig: LatentAttention}
"""The module of each kind of mixer."""


class Block(nnx.Module):
    """Layer `index` of a decoder."""

    def __init__(self, config: ModelConfig, index: int, *, mesh: AnyMesh, rngs: nnx.Rngs, dtype: DTypeLike):
        """Random weights."""
        width, layer = config.hidden_size, config.layers[index]
        self.residual_scale = config.residual_scale
        self.attention_norm = Norm(config.norm, width, mesh=mesh, dtype=dtype)
        self.attention = MIXERS[type(layer.mixer)](layer.mixer, width, config.norm, mesh=mesh, rngs=rngs, dtype=dtype)
        self.mlp_norm = Norm(config.norm, width, mesh=mesh, dtype=dtype)
        self.sparse = layer.moe is not None
        if layer.moe is not None:
            self.moe = MoE(layer.moe, rngs=rngs, dtype=dtype, mesh=mesh)
        else:
            hidden = layer.dense_intermediate_size
            self.mlp = DenseMLP(width, hidden, config.activation, mesh=mesh, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        places: Places,
        segments: Int[Array, "B S"],
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B S D"], MoEDetails | None]:
        """Whole sequences; segment 0 is padding, which goes to no expert."""
        y, _, details = self._run(
            x, lambda h: (self.attention(h, places, segments, stream), None), segments > 0, stream, parallel
        )
        return y, details

    def prefill(
        self,
        x: Float[Array, "B S D"],
        places: Places,
        lengths: Int[Array, " B"],
        max_len: int,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B S D"], Cache, MoEDetails | None]:
        """Right-padded prompts of `lengths` tokens, and their cache."""
        real = jnp.arange(x.shape[1], dtype=jnp.int32) < lengths[:, None]
        return self._run(  # type: ignore[return-value]
            x, lambda h: self.attention.prefill(h, places, lengths, max_len, stream), real, stream, parallel
        )

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        places: Places,
        positions: Int[Array, " B"],
        active: Bool[Array, " B"],
        cache: Cache,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B 1 D"], Cache, MoEDetails | None]:
        """One more token for each row; rows that are not active (finished, or padding) go to no expert."""
        return self._run(  # type: ignore[return-value]
            x, lambda h: self.attention.decode(h, places, positions, cache, stream), active[:, None], stream, parallel
        )

    def _run(
        self,
        x: jax.Array,
        attention: Callable[[jax.Array], tuple[jax.Array, Cache]],
        real: jax.Array,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[jax.Array, Cache, MoEDetails | None]:
        with jax.named_scope("attention"):
            y, cache = attention(self.attention_norm(x))
        x = self._add(x, y)
        hidden = self.mlp_norm(x)
        if self.sparse:
            y, details = self.moe.with_details(hidden, real, parallel)
            return self._add(x, y), cache, details
        with jax.named_scope("mlp"):
            return self._add(x, self.mlp(hidden, stream)), cache, None

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y if self.residual_scale == 1 else x + y * jnp.asarray(self.residual_scale, y.dtype)
