"""Self-attention over heads cut across the mesh.

Each device holds whole heads: over `tp` as the parameters lie, and, where the stream is replicated over `ep`, its block
of those. One sum over the devices at the end puts the output together. The heads themselves are laid out by
`head_layout`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.moe.layer import sharded_param
from moejax.nn.attend import attend, attend_causal
from moejax.nn.cache import LayerCache, appended, cache_size, filled, valid_places
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout
from moejax.nn.norm import rms_norm, scaled
from moejax.nn.rope import apply_rope
from moejax.nn.stream import Stream
from moejax.precision import precision_of
from moejax.sharding import AnyMesh, axis_size, psum

Params: TypeAlias = dict[str, jax.Array]
Mix: TypeAlias = Callable[..., tuple[jax.Array, LayerCache | None]]

CUTS: dict[str, tuple[str | None, ...]] = {
    "q": (None, "tp", None),
    "k": (None, "tp", None),
    "v": (None, "tp", None),
    "o": ("tp", None, None),
    "q_bias": ("tp", None),
    "k_bias": ("tp", None),
    "v_bias": ("tp", None),
    "o_bias": (None,),
}


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings; parameters `q k v [D, heads, H]`, `o [heads, H, D]`, biases and
    norms.

    Query heads are zero-padded to a multiple of tp and key/value heads repeated where tp devices share one; see
    `head_layout`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        norm_eps: float,
        window: int | None,
        *,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        """Random weights; `window` is the sliding window in tokens, None for full attention."""
        self.config, self.norm_eps, self.window = config, norm_eps, window
        self.layout = head_layout(config.num_heads, config.num_kv_heads, axis_size(mesh, "tp"))
        heads, kv_heads, h = self.layout.num_heads, self.layout.num_kv_heads, config.head_dim

        def param(name: str, shape: tuple[int, ...], inputs: int = 0) -> None:
            value = (
                jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(inputs**-0.5, dtype)
                if inputs
                else jnp.zeros(shape, dtype)
            )
            setattr(self, name, sharded_param(value, mesh, *CUTS[name]))

        param("q", (width, heads, h), width)
        param("k", (width, kv_heads, h), width)
        param("v", (width, kv_heads, h), width)
        param("o", (heads, h, width), heads * h)
        if config.qkv_bias:
            param("q_bias", (heads, h))
            param("k_bias", (kv_heads, h))
            param("v_bias", (kv_heads, h))
        if config.out_bias:
            param("o_bias", (width,))
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
                ones = jnp.ones((count, h) if full else (h,), dtype)
                setattr(self, name, sharded_param(ones, mesh, *(("tp", None) if full else (None,))))

    def __call__(
        self, x: Float[Array, "B S D"], rope: tuple[jax.Array, jax.Array], segments: Int[Array, "B S"], stream: Stream
    ) -> Float[Array, "B S D"]:
        """Attention of whole sequences over themselves; `rope` is (cosine, sine) `[B, S, H/2]`; segment 0 pads."""

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, None]:
            return attend_causal(q, _heads_first(k), _heads_first(v), segments, self.window), None

        return self._on_shards(mix, x, rope, (segments,), stream)[0]

    def prefill(
        self,
        x: Float[Array, "B S D"],
        rope: tuple[jax.Array, jax.Array],
        lengths: Int[Array, " B"],
        max_len: int,
        stream: Stream,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """The same for right-padded prompts of `lengths` tokens, with a cache that has room for `max_len` tokens."""

        def mix(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple[jax.Array, LayerCache]:
            k, v = _heads_first(k), _heads_first(v)
            segments = (jnp.arange(q.shape[1], dtype=jnp.int32) < lengths[:, None]).astype(jnp.int32)
            return attend_causal(q, k, v, segments, self.window), filled(
                k, v, lengths, cache_size(self.window, max_len)
            )

        y, cache = self._on_shards(mix, x, rope, (lengths,), stream, returns_cache=True)
        assert cache is not None
        return y, cache

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        rope: tuple[jax.Array, jax.Array],
        positions: Int[Array, " B"],
        cache: LayerCache,
        stream: Stream,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """One more token a row, at `positions`, over the cache of those before."""

        def mix(
            q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache]:
            cache = appended(cache, _heads_first(k), _heads_first(v), positions)
            return attend(q, cache.k, cache.v, valid_places(cache, positions)), cache

        y, new = self._on_shards(mix, x, rope, (positions, cache), stream, returns_cache=True)
        assert new is not None
        return y, new

    def share(self, stream: Stream) -> HeadShare:
        """The heads that each device computes under this stream."""
        return HeadShare.of(self.layout, stream)

    def _on_shards(
        self,
        mix: Mix,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        extras: tuple,
        stream: Stream,
        returns_cache: bool = False,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Projects, lets `mix` attend over the local heads, projects back and sums over devices with other heads."""
        share = self.share(stream)
        params = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        bias = params.pop("o_bias", None)
        specs = {name: stream.spec(*self._cut(name)) for name in params}

        def local(params: Params, x: jax.Array, rope: tuple[jax.Array, jax.Array], *extras: Any):
            mine = share.take(params)
            q, k, v = self._project(mine, x, rope, share)
            out, cache = mix(q, k, v, *extras)
            y = jnp.einsum("bsnh,nhd->bsd", out, mine["o"], precision=precision_of(x.dtype))
            return psum(y, share.axes), cache

        rows = stream.batch_spec
        cache_spec = share.cache_spec
        mapped = jax.shard_map(
            local,
            mesh=stream.mesh,
            in_specs=(specs, rows, rows, *(cache_spec if isinstance(e, LayerCache) else rows for e in extras)),
            out_specs=(rows, cache_spec if returns_cache else None),
            check_vma=True,
        )
        y, cache = mapped(params, x, rope, *extras)
        return (y if bias is None else y + bias), cache

    def _cut(self, name: str) -> tuple[str | None, ...]:
        if name in CUTS:
            return CUTS[name]
        return ("tp", None) if self.config.qk_norm == "full" else (None,)

    def _project(
        self, params: Params, x: jax.Array, rope: tuple[jax.Array, jax.Array], share: HeadShare
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, S, heads, H]` of the local heads: biased, normalised, clipped, turned."""
        q, k, v = (
            jnp.einsum("bsd,dnh->bsnh", x, params[name], precision=precision_of(x.dtype)) for name in ("q", "k", "v")
        )
        if self.config.qkv_bias:
            q, k, v = q + params["q_bias"], k + params["k_bias"], v + params["v_bias"]
        if self.config.qk_norm == "head":
            q, k = rms_norm(q, params["q_norm"], self.norm_eps), rms_norm(k, params["k_norm"], self.norm_eps)
        elif self.config.qk_norm == "full":
            q, k = self._norm_full(q, k, params, share)
        if (limit := self.config.clip_qkv) is not None:
            q, k, v = (jnp.clip(a, -limit, limit) for a in (q, k, v))
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def _norm_full(self, q: jax.Array, k: jax.Array, params: Params, share: HeadShare) -> tuple[jax.Array, jax.Array]:
        """Norm over all heads together: the sums of squares travel in one collective, each head counted once."""
        counts = share.kv_weights()
        squares_q = jnp.square(q.astype(jnp.float32)).sum((-1, -2))
        squares_k = jnp.einsum("bsgh,g->bs", jnp.square(k.astype(jnp.float32)), counts, precision=lax.Precision.HIGHEST)
        squares = psum(jnp.stack([squares_q, squares_k], -1), share.axes)
        h = self.config.head_dim
        mean_q = squares[..., 0] / (self.config.num_heads * h)
        mean_k = squares[..., 1] / (self.config.num_kv_heads * h)
        q = scaled(q, mean_q[..., None, None], params["q_norm"], self.norm_eps)
        return q, scaled(k, mean_k[..., None, None], params["k_norm"], self.norm_eps)


def _heads_first(x: Float[Array, "B S G H"]) -> Float[Array, "B G S H"]:
    return jnp.swapaxes(x, 1, 2)
