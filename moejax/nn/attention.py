"""Self-attention over heads cut across the mesh.

Each device holds whole heads: over `tp` as the parameters lie, and, where the stream is replicated over `ep`, its block
of those. One sum over the devices at the end puts the output together. The heads themselves are laid out by
`head_layout`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig, NormConfig
from moejax.kernels.linear import linear
from moejax.nn.attend import attend_causal, attend_places
from moejax.nn.cache import LayerCache, cache_size, extended
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout
from moejax.nn.norm import neutral, normalise, scaled, unit_norm
from moejax.nn.places import Places
from moejax.nn.rope import apply_rope
from moejax.nn.segments import row_places
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh, axis_size, place, psum, sharded_param

Params: TypeAlias = dict[str, Any]
Mix: TypeAlias = Callable[..., tuple[jax.Array, LayerCache | None]]

# The axis of each parameter that its heads, query or key/value, are on; that axis is cut over tp.
QUERY_HEADS = {"q": 1, "gate": 1, "o": 0, "q_bias": 0, "gate_bias": 0, "sinks": 0}
KV_HEADS = {"k": 1, "v": 1, "k_bias": 0, "v_bias": 0}
LINEAR = {"q", "k", "v", "gate", "o"}


class Attention(nnx.Module):
    """Grouped-query attention; parameters `q k v [D, heads, H]`, `o [heads, H, D]` and those that the config asks for.

    Query heads are zero-padded to a multiple of tp and key/value heads repeated where tp devices share one; see
    `head_layout`.
    """

    def __init__(
        self, config: AttentionConfig, width: int, norm: NormConfig, *, mesh: AnyMesh, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        """Random weights, neutral norms, zero biases and sinks."""
        self.config, self.norm = config, norm
        self.layout = head_layout(config.num_heads, config.num_kv_heads, axis_size(mesh, "tp"))
        for name, (shape, inputs) in self._shapes(width).items():
            if "norm" in name:
                value = neutral(norm, shape, dtype)
            elif inputs:
                value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(inputs**-0.5, dtype)
            else:
                value = jnp.zeros(shape, dtype)
            setattr(self, name, sharded_param(value, mesh, *self._cut(name, value.ndim)))

    def _shapes(self, width: int) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and inputs (0 for what is no matrix) of each parameter."""
        config, heads, kv_heads = self.config, self.layout.num_heads, self.layout.num_kv_heads
        h = config.head_dim
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "q": ((width, heads, h), width),
            "k": ((width, kv_heads, h), width),
            "o": ((heads, h, width), heads * h),
        }
        if not config.keys_are_values:
            shapes["v"] = ((width, kv_heads, h), width)
        if config.gate:
            shapes["gate"] = ((width, heads, h), width)
        if config.qkv_bias:
            shapes |= {f"{name}_bias": (shape[1:], 0) for name, (shape, _) in shapes.items() if name != "o"}
        if config.out_bias:
            shapes["o_bias"] = ((width,), 0)
        if config.sinks:
            shapes["sinks"] = ((heads,), 0)
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            shapes["q_norm"] = ((heads, h) if full else (h,), 0)
            shapes["k_norm"] = ((kv_heads, h) if full else (h,), 0)
        return shapes

    def __call__(
        self, x: Float[Array, "B S D"], places: Places, segments: Int[Array, "B S"], stream: Stream
    ) -> Float[Array, "B S D"]:
        """Attention of whole sequences over themselves; segment 0 pads."""
        if self.config.temperature is not None:
            # Transformers counts the row's places here, whatever the positions say.
            places = replace(places, positions=row_places(segments))

        def mix(params: Params, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array):
            return self._over_itself(params, q, _heads_first(k), _heads_first(v), segments), None

        return self._on_shards(mix, x, places, (segments,), stream)[0]

    def empty_cache(self, rows: int, max_len: int, dtype: DTypeLike, stream: Stream) -> LayerCache:
        """A cache with room for `max_len` tokens in each of `rows` rows."""
        size = cache_size(self.config.window or self.config.chunk, max_len)
        shape = (rows, self.share(stream).total_kv_heads, size, self.config.head_dim)
        empty = place(jnp.zeros(shape, dtype), stream.mesh, self.share(stream).cache_spec)
        return LayerCache(k=empty, v=empty)

    def extend(
        self, x: Float[Array, "B S D"], places: Places, cache: LayerCache, stream: Stream
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """S more tokens a row over the cache of those before; positions of -1 pad a row behind its tokens."""
        config = self.config

        def mix(params: Params, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, cache: LayerCache):
            keys, new = extended(cache, k, v, positions, ring=(config.window or config.chunk) is not None)
            out = attend_places(
                q,
                keys.k,
                keys.v,
                positions,
                keys.positions,
                window=config.window,
                chunk=config.chunk,
                scale=config.scale,
                sinks=params.get("sinks"),
            )
            return out, new

        y, new = self._on_shards(mix, x, places, (places.positions, cache), stream, returns_cache=True)
        assert new is not None
        return y, new

    def share(self, stream: Stream) -> HeadShare:
        """The heads that each device computes under this stream."""
        return HeadShare.of(self.layout, stream)

    def _over_itself(
        self, params: Params, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
    ) -> Float[Array, "B S N H"]:
        config = self.config
        return attend_causal(
            q, k, v, segments, config.window, chunk=config.chunk, scale=config.scale, sinks=params.get("sinks")
        )

    def _on_shards(
        self, mix: Mix, x: jax.Array, places: Places, extras: tuple, stream: Stream, returns_cache: bool = False
    ) -> tuple[jax.Array, LayerCache | None]:
        """Projects, lets `mix` attend over the local heads, projects back and sums over devices with other heads."""
        share = self.share(stream)
        params = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        bias = params.pop("o_bias", None)
        specs = {name: stream.spec(*self._cut(name, value.ndim)) for name, value in params.items()}
        where = (*places.table(self.config.rope), places.positions)

        def local(params: Params, x: jax.Array, where: tuple[jax.Array, ...], *extras):
            mine = share.take(params, *self._head_axes(), LINEAR)
            q, k, v = self._project(mine, x, where, share)
            out, cache = mix(mine, q, k, v, *extras)
            if self.config.gate:
                out = out * jax.nn.sigmoid(_projected(x, mine, "gate"))
            y = linear(out, mine["o"], axes=2)
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
        y, cache = mapped(params, x, where, *extras)
        return (y if bias is None else y + bias), cache

    def _head_axes(self) -> tuple[dict[str, int], dict[str, int]]:
        """QUERY_HEADS and KV_HEADS, with the norms where they go over all heads."""
        full = self.config.qk_norm == "full"
        return QUERY_HEADS | ({"q_norm": 0} if full else {}), KV_HEADS | ({"k_norm": 0} if full else {})

    def _cut(self, name: str, ndim: int) -> tuple[str | None, ...]:
        queries, keys = self._head_axes()
        axis = queries.get(name, keys.get(name))
        return tuple("tp" if i == axis else None for i in range(ndim))

    def _project(
        self, params: Params, x: jax.Array, where: tuple[jax.Array, ...], share: HeadShare
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, S, heads, H]` of the local heads: biased, normalised, clipped, turned."""
        config = self.config
        cos, sin, positions = where
        q, k = _projected(x, params, "q"), _projected(x, params, "k")
        v = k if config.keys_are_values else _projected(x, params, "v")
        if config.value_norm:
            v = unit_norm(v, self.norm.eps)
        interleaved = config.rope is not None and config.rope.interleaved
        if config.norm_after_rope:
            q, k = (apply_rope(a, cos, sin, interleaved) for a in (q, k))
        q, k = self._normed(q, k, params, share)
        if (limit := config.clip_qkv) is not None:
            q, k, v = (jnp.clip(a, -limit, limit) for a in (q, k, v))
        if not config.norm_after_rope:
            q, k = (apply_rope(a, cos, sin, interleaved) for a in (q, k))
        if config.temperature is not None:
            q = _tempered(q, positions, *config.temperature)
        return q, k, v

    def _normed(self, q: jax.Array, k: jax.Array, params: Params, share: HeadShare) -> tuple[jax.Array, jax.Array]:
        match self.config.qk_norm:
            case "none":
                return q, k
            case "unit":
                return unit_norm(q, self.norm.eps), unit_norm(k, self.norm.eps)
            case "head":
                return normalise(q, self.norm, params["q_norm"]), normalise(k, self.norm, params["k_norm"])
            case "full":
                return self._norm_full(q, k, params, share)

    def _norm_full(self, q: jax.Array, k: jax.Array, params: Params, share: HeadShare) -> tuple[jax.Array, jax.Array]:
        """Norm over all heads together: the sums of squares travel in one collective, each head counted once."""
        counts = share.kv_weights()
        squares_q = jnp.square(q.astype(jnp.float32)).sum((-1, -2))
        squares_k = jnp.einsum("bsgh,g->bs", jnp.square(k.astype(jnp.float32)), counts, precision=lax.Precision.HIGHEST)
        squares = psum(jnp.stack([squares_q, squares_k], -1), share.axes)
        h = self.config.head_dim
        mean_q = squares[..., 0] / (self.config.num_heads * h)
        mean_k = squares[..., 1] / (self.config.num_kv_heads * h)
        q = scaled(q, mean_q[..., None, None], self.norm, params["q_norm"])
        return q, scaled(k, mean_k[..., None, None], self.norm, params["k_norm"])


def _projected(x: Float[Array, "B S D"], params: Params, name: str) -> Float[Array, "B S N H"]:
    y = linear(x, params[name])
    return y + params[f"{name}_bias"] if f"{name}_bias" in params else y


def _tempered(
    q: Float[Array, "B S N H"], positions: Int[Array, "B S"], floor: float, scale: float
) -> Float[Array, "B S N H"]:
    """Queries grown with the position, so that attention stays sharp over long contexts.

    Source: Nakanishi 2025, "Scalable-Softmax Is Superior for Attention", as Llama 4 uses it.
    """
    steps = jnp.floor((positions.astype(jnp.float32) + 1) / floor)
    growth = jnp.log1p(steps) * scale + 1
    return (q.astype(jnp.float32) * growth[..., None, None]).astype(q.dtype)


def _heads_first(x: Float[Array, "B S G H"]) -> Float[Array, "B G S H"]:
    return jnp.swapaxes(x, 1, 2)
