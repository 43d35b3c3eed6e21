"""One decoder layer: a mixer and a mixture of experts (or a dense MLP), each after a norm and added to the stream."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, ModelConfig
from moejax.moe.jitter import Jitter
from moejax.moe.layer import MoE, MoEDetails, Parallel, sharded_param
from moejax.moe.router import Router
from moejax.nn.attention import Attention
from moejax.nn.cache import Cache
from moejax.nn.delta_net import DeltaNet
from moejax.nn.latent_attention import LatentAttention
from moejax.nn.mlp import DenseMLP
from moejax.nn.norm import Norm
from moejax.nn.places import Places
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh

MIXERS: dict[type, Any] = {AttentionConfig: Attention, LatentAttentionConfig: LatentAttention, DeltaNetConfig: DeltaNet}
"""The module of each kind of mixer."""


class Block(nnx.Module):
    """Layer `index` of a decoder."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        router: Router | None = None,
    ):
        """Random weights; `router` is that of `MoE`."""
        width, layer = config.hidden_size, config.layers[index]
        self.layer, self.residual_scale = layer, config.residual_scale
        norm = functools.partial(Norm, config.norm, width, mesh=mesh, dtype=dtype)
        self.attention_norm = norm()
        self.attention = MIXERS[type(layer.mixer)](layer.mixer, width, config.norm, mesh=mesh, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        if layer.branch_norms:
            self.attention_out_norm, self.out_norm = norm(), norm()
        if layer.moe is not None:
            self.moe = MoE(layer.moe, rngs=rngs, router=router, dtype=dtype, mesh=mesh)
        if hidden := layer.dense_intermediate_size:
            self.mlp = DenseMLP(
                width, hidden, config.activation, bias=layer.dense_bias, mesh=mesh, rngs=rngs, dtype=dtype
            )
        if layer.side_by_side:
            self.mlp_out_norm, self.moe_norm, self.moe_out_norm = norm(), norm(), norm()
            self.router_norm = Norm(replace(config.norm, kind="rms"), width, mesh=mesh, dtype=dtype)
        if layer.output_scale:
            self.output_scale = sharded_param(jnp.ones(1, dtype), mesh, None)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        places: Places,
        segments: Int[Array, "B S"],
        stream: Stream,
        parallel: Parallel,
        jitter: Jitter | None = None,
    ) -> tuple[Float[Array, "B S D"], MoEDetails | None]:
        """Whole sequences; segment 0 is padding, which goes to no expert. `jitter` is noise for the router."""
        y, _, details = self._run(
            x, lambda h: (self.attention(h, places, segments, stream), None), segments > 0, stream, parallel, jitter
        )
        return y, details

    def empty_cache(self, rows: int, max_len: int, dtype: DTypeLike, stream: Stream) -> Cache:
        """What the mixer keeps of no tokens, with room for `max_len` in each of `rows` rows."""
        return self.attention.empty_cache(rows, max_len, dtype, stream)

    def extend(
        self, x: Float[Array, "B S D"], places: Places, cache: Cache, stream: Stream, parallel: Parallel
    ) -> tuple[Float[Array, "B S D"], Cache, MoEDetails | None]:
        """S more tokens a row over the cache of those before; what has the position -1 goes to no expert."""
        return self._run(
            x, lambda h: self.attention.extend(h, places, cache, stream), places.positions >= 0, stream, parallel
        )

    def _run(
        self,
        x: jax.Array,
        attention: Callable[[jax.Array], tuple[jax.Array, Cache]],
        real: jax.Array,
        stream: Stream,
        parallel: Parallel,
        jitter: Jitter | None = None,
    ) -> tuple[jax.Array, Cache, MoEDetails | None]:
        with jax.named_scope("attention"):
            y, cache = attention(self.attention_norm(x))
        x = self._add(x, self.attention_out_norm(y) if self.layer.branch_norms else y)
        y, details = self._feed_forward(x, real, stream, parallel, jitter)
        x = self._add(x, self.out_norm(y) if self.layer.branch_norms else y)
        return x * self.output_scale[...] if self.layer.output_scale else x, cache, details

    def _feed_forward(
        self, x: jax.Array, real: jax.Array, stream: Stream, parallel: Parallel, jitter: Jitter | None
    ) -> tuple[jax.Array, MoEDetails | None]:
        hidden = self.mlp_norm(x)
        if self.layer.side_by_side:
            return self._side_by_side(x, hidden, real, stream, parallel, jitter)
        if self.layer.moe is not None:
            return self.moe.with_details(hidden, real, parallel, jitter=jitter)
        with jax.named_scope("mlp"):
            return self.mlp(hidden, stream), None

    def _side_by_side(
        self,
        x: jax.Array,
        hidden: jax.Array,
        real: jax.Array,
        stream: Stream,
        parallel: Parallel,
        jitter: Jitter | None,
    ) -> tuple[jax.Array, MoEDetails]:
        """The dense MLP's output and the experts', each normalised, summed.

        Source: transformers' `Gemma4TextDecoderLayer` and `Gemma4TextRouter`.
        """
        with jax.named_scope("mlp"):
            dense = self.mlp_out_norm(self.mlp(hidden, stream))
        with jax.named_scope("router"):
            seen = (self.router_norm(x).astype(jnp.float32) * x.shape[-1] ** -0.5).astype(x.dtype)
        sparse, details = self.moe.with_details(self.moe_norm(x), real, parallel, seen, jitter)
        return dense + self.moe_out_norm(sparse), details

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return added(x, y, self.residual_scale)


def added(x: jax.Array, y: jax.Array, scale: float) -> jax.Array:
    """The stream with a branch's output added, scaled in f32 (a 16-bit scale would be off in all tokens alike)."""
    return x + y if scale == 1 else x + (y.astype(jnp.float32) * scale).astype(y.dtype)
