"""Multi-head latent attention: all heads' keys and values come from one short latent a token, and that is what is kept.

Several tokens at once write out the keys and values of each head. A decoded token does not: the key half of `kv_b`
moves its queries into the latent's space instead, they meet the kept latents there, and the value half moves the sum of
latents out again. Both are the same sums in another order.

Heads are cut across the mesh as in `attention`; the latents, which all heads read, are computed on every device.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import LatentAttentionConfig, NormConfig
from moejax.kernels.attention.blocks import LOW, block_of_keys, key_block
from moejax.kernels.attention.platforms import attention_with_logs
from moejax.kernels.attention.sight import Keys, queries_at
from moejax.kernels.linear import linear
from moejax.nn.attend import attend_causal, attend_places
from moejax.nn.cache import held
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout
from moejax.nn.latent_cache import LatentCache, extended
from moejax.nn.norm import rms_norm
from moejax.nn.places import Places
from moejax.nn.rope import apply_rope
from moejax.nn.stream import Stream
from moejax.precision import precision_of
from moejax.sharding import AnyMesh, axis_size, pad_axis, place, psum, sharded_param, varying_as

Params: TypeAlias = dict[str, Any]
Mix: TypeAlias = Callable[..., tuple[jax.Array, LatentCache | None]]

# The axis of each parameter that its heads are on, which is cut over tp.
HEADS = {"q": 1, "q_b": 1, "kv_b": 1, "o": 0}
LINEAR = {"q", "q_b", "o"}

WRITTEN_OUT = 256
"""Latents of a cache whose keys and values are there at one time."""


class LatentAttention(nnx.Module):
    """Attention through latents; `heads` are the config's, zero-padded to a multiple of tp.

    Parameters: `kv_a [D, kv_rank + rope]`, `kv_a_norm [kv_rank]`, `kv_b [kv_rank, heads, nope + value]` and
    `o [heads, value, D]`; queries by `q [D, heads, nope + rope]`, or with a `query_rank` by `q_a [D, query_rank]`,
    `q_a_norm [query_rank]` and `q_b [query_rank, heads, nope + rope]`; with `bias` also `kv_a_bias`, `q_a_bias`,
    `o_bias [D]`.

    Source: DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    sections 2.1.2 and 2.1.3.
    """

    def __init__(
        self,
        config: LatentAttentionConfig,
        width: int,
        norm: NormConfig,
        *,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        """Random weights, neutral norms, zero biases. Of `norm` nothing is taken: latents have their own epsilon."""
        self.config = config
        self.layout = head_layout(config.num_heads, config.num_heads, axis_size(mesh, "tp"))
        for name, (shape, inputs) in _shapes(config, width).items():
            if inputs:
                value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(inputs**-0.5, dtype)
            else:
                value = jnp.full(shape, 1 if name.endswith("norm") else 0, dtype)
            if name in HEADS:
                value = pad_axis(value, HEADS[name], self.layout.num_heads)
            setattr(self, name, sharded_param(value, mesh, *_cut(name, value.ndim)))

    def __call__(
        self, x: Float[Array, "B S D"], places: Places, segments: Int[Array, "B S"], stream: Stream
    ) -> Float[Array, "B S D"]:
        """Attention of whole sequences over themselves; segment 0 pads."""

        def mix(params: Params, q: jax.Array, latent: jax.Array, segments: jax.Array):
            return self._over_itself(params, q, latent, segments), None

        return self._on_shards(mix, x, places, (segments,), stream)[0]

    def empty_cache(self, rows: int, max_len: int, dtype: DTypeLike, stream: Stream) -> LatentCache:
        """A cache with room for `max_len` tokens in each of `rows` rows."""
        shape = (rows, max_len, self.config.kv_rank + self.config.rope.dim)
        return LatentCache(latent=place(jnp.zeros(shape, dtype), stream.mesh, stream.batch_spec))

    def extend(
        self, x: Float[Array, "B S D"], places: Places, cache: LatentCache, stream: Stream
    ) -> tuple[Float[Array, "B S D"], LatentCache]:
        """S more tokens a row over the cache of those before; positions of -1 pad a row behind its tokens."""

        def mix(params: Params, q: jax.Array, latent: jax.Array, positions: jax.Array, cache: LatentCache):
            new = extended(cache, latent, positions)
            held_places = held(positions.max(1), new.latent.shape[1])
            over = self._over_latents if q.shape[1] == 1 else self._over_heads
            return over(params, q, new.latent, positions, held_places), new

        y, new = self._on_shards(mix, x, places, (places.positions, cache), stream, returns_cache=True)
        assert new is not None
        return y, new

    def share(self, stream: Stream) -> HeadShare:
        """The heads that each device computes under this stream."""
        return HeadShare.of(self.layout, stream)

    def _on_shards(
        self, mix: Mix, x: jax.Array, places: Places, extras: tuple, stream: Stream, returns_cache: bool = False
    ) -> tuple[jax.Array, LatentCache | None]:
        """Projects, lets `mix` attend with the local heads, projects back and sums over devices with other heads."""
        share, rows = self.share(stream), stream.batch_spec
        params = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        bias = params.pop("o_bias", None)
        specs = {name: stream.spec(*_cut(name, value.ndim)) for name, value in params.items()}

        def local(params: Params, x: jax.Array, table: tuple[jax.Array, jax.Array], *extras):
            mine = share.take(params, HEADS, {}, LINEAR)
            out, cache = mix(mine, self._queries(mine, x, table), self._latents(mine, x, table), *extras)
            y = linear(out, mine["o"], axes=2)
            return psum(y, share.axes), cache

        mapped = jax.shard_map(
            local,
            mesh=stream.mesh,
            in_specs=(specs, *[rows] * (2 + len(extras))),
            out_specs=(rows, rows if returns_cache else None),
            check_vma=True,
        )
        y, cache = mapped(params, x, places.table(self.config.rope), *extras)
        return (y if bias is None else y + bias), cache

    def _queries(
        self, params: Params, x: Float[Array, "B S D"], table: tuple[jax.Array, jax.Array]
    ) -> Float[Array, "B S N H"]:
        """The local heads' queries, the last rope.dim values of each turned."""
        config = self.config
        if config.query_rank is None:
            q = linear(x, params["q"])
        else:
            latent = rms_norm(_projected(x, params, "q_a"), params["q_a_norm"], config.latent_norm_eps)
            q = linear(latent, params["q_b"])
        nope, rope = jnp.split(q, [config.nope_dim], -1)
        return jnp.concatenate([nope, apply_rope(rope, *table, config.rope.interleaved)], -1)

    def _latents(
        self, params: Params, x: Float[Array, "B S D"], table: tuple[jax.Array, jax.Array]
    ) -> Float[Array, "B S L"]:
        """What the cache keeps of each token."""
        config = self.config
        latent, key = jnp.split(_projected(x, params, "kv_a"), [config.kv_rank], -1)
        latent = rms_norm(latent, params["kv_a_norm"], config.latent_norm_eps)
        key = apply_rope(key[:, :, None], *table, config.rope.interleaved)[:, :, 0]
        return jnp.concatenate([latent, key], -1)

    def _over_itself(
        self, params: Params, q: Float[Array, "B S N H"], latent: Float[Array, "B S L"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S N Hv"]:
        return attend_causal(q, *self._written_out(params, latent), segments, scale=self.config.scale)

    def _over_heads(
        self,
        params: Params,
        q: Float[Array, "B S N H"],
        latent: Float[Array, "B C L"],
        positions: Int[Array, "B S"],
        held_places: Int[Array, "B C"],
    ) -> Float[Array, "B S N Hv"]:
        """Over the keys and values of each local head: fewer products where many queries share what is written out.

        One block of the filled places is written out at a time, so that memory does not grow with the cache.
        """
        size = min(WRITTEN_OUT, latent.shape[1])
        queries, keys = queries_at(positions, None, None, None), Keys(held_places, None)

        def of_block(j: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            out, logs = sums
            k, v = self._written_out(params, key_block(latent, 1, j, size))
            more, more_logs = attention_with_logs(q, k, v, queries, block_of_keys(keys, j, size), self.config.scale)
            total = jnp.logaddexp(logs, more_logs)
            kept, added = (jnp.exp(log - total)[..., None] for log in (logs, more_logs))
            return out * kept + more.astype(jnp.float32) * added, total

        shape = (*q.shape[:3], self.config.value_dim)
        nothing = varying_as(jnp.zeros(shape, jnp.float32), q, latent, held_places)
        blocks = (held_places.max() + jnp.int32(size)) // size  # place p holds position p
        start = (nothing, jnp.full_like(nothing[..., 0], LOW))
        return lax.fori_loop(jnp.int32(0), blocks, of_block, start)[0].astype(q.dtype)

    def _over_latents(
        self,
        params: Params,
        q: Float[Array, "B S N H"],
        latent: Float[Array, "B C L"],
        positions: Int[Array, "B S"],
        held_places: Int[Array, "B C"],
    ) -> Float[Array, "B S N Hv"]:
        """With the kept latents themselves as the one key/value head that all local heads share."""
        config, exact = self.config, precision_of(q.dtype)
        to_key, to_value = jnp.split(params["kv_b"], [config.nope_dim], -1)
        nope, rope = jnp.split(q, [config.nope_dim], -1)
        q = jnp.concatenate([jnp.einsum("bsnh,lnh->bsnl", nope, to_key, precision=exact), rope], -1)
        kept = latent[:, None]
        # The shared keys are summed too and dropped: a few products more, but no copy of the latents without them.
        out = attend_places(q, kept, kept, positions, held_places, scale=config.scale)
        return jnp.einsum("bsnl,lnv->bsnv", out[..., : config.kv_rank], to_value, precision=exact)

    def _written_out(
        self, params: Params, latent: Float[Array, "B T L"]
    ) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T Hv"]]:
        """The keys and values of each local head."""
        config = self.config
        latent, shared = jnp.split(latent, [config.kv_rank], -1)
        kv = linear(latent, params["kv_b"]).swapaxes(1, 2)
        k, v = jnp.split(kv, [config.nope_dim], -1)
        shared = jnp.broadcast_to(shared[:, None], (*k.shape[:-1], config.rope.dim))
        return jnp.concatenate([k, shared], -1), v


def _shapes(config: LatentAttentionConfig, width: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape, with the checkpoint's heads, and inputs (0 for what is no matrix) of each parameter."""
    heads, latent, rope = config.num_heads, config.kv_rank, config.rope.dim
    query = config.nope_dim + rope
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "kv_a": ((width, latent + rope), width),
        "kv_a_norm": ((latent,), 0),
        "kv_b": ((latent, heads, config.nope_dim + config.value_dim), latent),
        "o": ((heads, config.value_dim, width), heads * config.value_dim),
    }
    if (rank := config.query_rank) is None:
        shapes["q"] = ((width, heads, query), width)
    else:
        shapes |= {"q_a": ((width, rank), width), "q_a_norm": ((rank,), 0), "q_b": ((rank, heads, query), rank)}
    if config.bias:
        shapes |= {f"{name}_bias": (shapes[name][0][-1:], 0) for name in ("kv_a", "q_a", "o") if name in shapes}
    return shapes


def _cut(name: str, ndim: int) -> tuple[str | None, ...]:
    return tuple("tp" if axis == HEADS.get(name) else None for axis in range(ndim))


def _projected(x: Float[Array, "B S D"], params: Params, name: str) -> Float[Array, "B S L"]:
    y = linear(x, params[name])
    return y + params[f"{name}_bias"] if f"{name}_bias" in params else y
