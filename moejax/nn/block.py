"""One decoder layer: attention and a mixture of experts (or a dense MLP), each after a norm and added to the stream."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.moe.layer import MoE, MoEDetails, Parallel, sharded_param
from moejax.nn.attention import Attention
from moejax.nn.cache import LayerCache
from moejax.nn.mlp import DenseMLP
from moejax.nn.norm import rms_norm
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh


class Block(nnx.Module):
    """Layer `index` of a decoder."""

    def __init__(self, config: ModelConfig, index: int, *, mesh: AnyMesh, rngs: nnx.Rngs, dtype: DTypeLike):
        """Random weights."""
        width = config.hidden_size
        self.norm_eps = config.norm_eps
        self.attention_norm = sharded_param(jnp.ones(width, dtype), mesh, None)
        self.attention = Attention(
            config.attention, width, config.norm_eps, config.windows[index], mesh=mesh, rngs=rngs, dtype=dtype
        )
        self.mlp_norm = sharded_param(jnp.ones(width, dtype), mesh, None)
        if config.sparse[index]:
            self.moe = MoE(config.moe, rngs=rngs, dtype=dtype, mesh=mesh)
        else:
            hidden = config.dense_intermediate_size
            self.mlp = DenseMLP(width, hidden, config.moe.activation, mesh=mesh, rngs=rngs, dtype=dtype)
        self.sparse = config.sparse[index]

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: tuple[jax.Array, jax.Array],
        segments: Int[Array, "B S"],
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B S D"], MoEDetails | None]:
        """Whole sequences; segment 0 is padding, which goes to no expert."""
        y, _, details = self._run(
            x, lambda h: (self.attention(h, rope, segments, stream), None), segments > 0, stream, parallel
        )
        return y, details

    def prefill(
        self,
        x: Float[Array, "B S D"],
        rope: tuple[jax.Array, jax.Array],
        lengths: Int[Array, " B"],
        max_len: int,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B S D"], LayerCache, MoEDetails | None]:
        """Right-padded prompts of `lengths` tokens, and their cache."""
        real = jnp.arange(x.shape[1], dtype=jnp.int32) < lengths[:, None]
        return self._run(  # type: ignore[return-value]
            x, lambda h: self.attention.prefill(h, rope, lengths, max_len, stream), real, stream, parallel
        )

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        rope: tuple[jax.Array, jax.Array],
        positions: Int[Array, " B"],
        active: Bool[Array, " B"],
        cache: LayerCache,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache, MoEDetails | None]:
        """One more token for each row; rows that are not active (finished, or padding) go to no expert."""
        return self._run(  # type: ignore[return-value]
            x, lambda h: self.attention.decode(h, rope, positions, cache, stream), active[:, None], stream, parallel
        )

    def _run(
        self,
        x: jax.Array,
        attention: Callable[[jax.Array], tuple[jax.Array, LayerCache | None]],
        real: jax.Array,
        stream: Stream,
        parallel: Parallel,
    ) -> tuple[jax.Array, LayerCache | None, MoEDetails | None]:
        with jax.named_scope("attention"):
            y, cache = attention(rms_norm(x, self.attention_norm[...], self.norm_eps))
        x = x + y
        hidden = rms_norm(x, self.mlp_norm[...], self.norm_eps)
        if self.sparse:
            y, details = self.moe.with_details(hidden, real, parallel)
            return x + y, cache, details
        with jax.named_scope("mlp"):
            return x + self.mlp(hidden, stream), cache, None
