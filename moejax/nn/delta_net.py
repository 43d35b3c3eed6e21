"""Gated DeltaNet: linear attention over value heads cut across the mesh.

Value heads lie as query heads do in attention, and the query and key heads, fewer than those, as its key/value heads:
see `head_layout`. One sum over the devices at the end puts the output together.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import DeltaNetConfig, NormConfig
from moejax.kernels.linear import linear
from moejax.moe.activations import named_activation
from moejax.nn.delta_rule import chunked, recurrent, restarts_of
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout
from moejax.nn.norm import rms_norm
from moejax.nn.places import Places
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh, axis_size, place, psum, sharded_param

Params: TypeAlias = dict[str, Any]
Triple: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
Mix: TypeAlias = Callable[..., tuple[jax.Array, "DeltaCache | None"]]

VALUE_HEADS = {"v": 1, "z": 1, "b": 1, "a": 1, "conv_v": 0, "dt_bias": 0, "A_log": 0, "o": 0}
"""The axis of the value heads for each parameter that has them."""
KEY_HEADS = {"q": 1, "k": 1, "conv_q": 0, "conv_k": 0}
"""That of the query and key heads."""
LINEAR = {"q", "k", "v", "z", "b", "a", "o"}


@struct.dataclass
class DeltaCache:
    """What a row's past leaves behind, whatever its length.

    Attributes:
      conv_q, conv_k, conv_v: what entered the convolution of the last kernel - 1 tokens, zeros before the first, in the
        model's dtype.
      state: of each value head, f32 always.
    """

    conv_q: Float[Array, "B G W Hk"]
    conv_k: Float[Array, "B G W Hk"]
    conv_v: Float[Array, "B N W Hv"]
    state: Float[Array, "B N Hk Hv"]


class DeltaNet(nnx.Module):
    """The mixer of Qwen3-Next's linear layers.

    Parameters, G key heads and N value heads as the mesh stores them: `q k [D, G, Hk]`, `v z [D, N, Hv]`, `b a [D, N]`,
    `conv_q conv_k [G, Hk, kernel]`, `conv_v [N, Hv, kernel]`, `dt_bias A_log [N]`, `norm [Hv]`, `o [N, Hv, D]`. Value
    heads are zero-padded to a multiple of tp and key heads repeated where devices share one; see `head_layout`.

    Source: transformers' `Qwen3NextGatedDeltaNet`. Queries, keys and values pass a convolution and an activation, then
    the gated delta rule with beta = sigmoid(b x) and log decay -exp(A_log) softplus(a x + dt_bias); its outputs, each
    head normalised, are multiplied by silu(z x).
    """

    def __init__(
        self,
        config: DeltaNetConfig,
        width: int,
        norm: NormConfig,
        *,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        """Random weights."""
        self.config, self.norm_eps = config, norm.eps
        self.layout = head_layout(config.num_value_heads, config.num_key_heads, axis_size(mesh, "tp"))
        heads, key_heads = self.layout.num_heads, self.layout.num_kv_heads
        hk, hv, kernel = config.key_dim, config.value_dim, config.kernel

        def param(name: str, value: jax.Array) -> None:
            setattr(self, name, sharded_param(value.astype(dtype), mesh, *_cut(name, value.ndim)))

        def normal(name: str, shape: tuple[int, ...], inputs: int) -> None:
            param(name, jax.random.normal(rngs.params(), shape, jnp.float32) * inputs**-0.5)

        for name in ("q", "k"):
            normal(name, (width, key_heads, hk), width)
            normal(f"conv_{name}", (key_heads, hk, kernel), kernel)
        for name in ("v", "z"):
            normal(name, (width, heads, hv), width)
        for name in ("b", "a"):
            normal(name, (width, heads), width)
        normal("conv_v", (heads, hv, kernel), kernel)
        normal("o", (heads, hv, width), heads * hv)
        param("dt_bias", jnp.ones(heads))
        param("A_log", jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 0.01, 16.0)))
        param("norm", jnp.ones(hv))

    def __call__(
        self, x: Float[Array, "B S D"], places: Places, segments: Int[Array, "B S"], stream: Stream
    ) -> Float[Array, "B S D"]:
        """Whole sequences; state and convolution start anew where a segment begins.

        Segment 0 pads. As in transformers its tokens count as zeros but are not skipped: the state fades over them, and
        in a gap inside a segment the convolution moves on and what it still holds is written.
        """

        def mix(params: Params, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, None]:
            restarts = restarts_of(segments)
            heads = self._convolved(params, self._inputs(params, x), restarts)
            return chunked(*heads, *_rates(params, x), restarts)[0], None

        return self._on_shards(mix, _masked(x, segments > 0), (segments,), stream)[0]

    def empty_cache(self, rows: int, max_len: int, dtype: DTypeLike, stream: Stream) -> DeltaCache:
        """What no token leaves behind; its size is the same for any `max_len`."""
        config, share = self.config, self.share(stream)
        keys = (rows, share.total_kv_heads, config.kernel - 1, config.key_dim)
        values = (rows, share.total_heads, config.kernel - 1, config.value_dim)
        state = (rows, share.total_heads, config.key_dim, config.value_dim)

        def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return place(jnp.zeros(shape, dtype), stream.mesh, share.cache_spec)

        return DeltaCache(
            conv_q=zeros(keys, dtype),
            conv_k=zeros(keys, dtype),
            conv_v=zeros(values, dtype),
            state=zeros(state, jnp.float32),
        )

    def extend(
        self, x: Float[Array, "B S D"], places: Places, cache: DeltaCache, stream: Stream
    ) -> tuple[Float[Array, "B S D"], DeltaCache]:
        """S more tokens a row after those of the cache; positions of -1 pad a row behind its tokens."""
        real = places.positions >= 0

        def mix(params: Params, x: jax.Array, real: jax.Array, cache: DeltaCache) -> tuple[jax.Array, DeltaCache]:
            inputs = self._inputs(params, x, (cache.conv_q, cache.conv_k, cache.conv_v))
            log_decay, beta = (_masked(rate, real) for rate in _rates(params, x))
            run = recurrent if x.shape[1] == 1 else chunked
            out, state = run(*self._convolved(params, inputs), log_decay, beta, state=cache.state)
            last = real.sum(1, keepdims=True, dtype=jnp.int32) + jnp.arange(self.config.kernel - 1, dtype=jnp.int32)
            q, k, v = (jnp.take_along_axis(a, last[..., None, None], 1).swapaxes(1, 2) for a in inputs)
            return out, DeltaCache(q, k, v, state)

        y, new = self._on_shards(mix, _masked(x, real), (real, cache), stream, returns_cache=True)
        assert new is not None
        return y, new

    def share(self, stream: Stream) -> HeadShare:
        """The heads that each device computes under this stream: value heads, and key heads as its `kv_heads`."""
        return HeadShare.of(self.layout, stream)

    def _on_shards(
        self, mix: Mix, x: jax.Array, extras: tuple, stream: Stream, returns_cache: bool = False
    ) -> tuple[jax.Array, DeltaCache | None]:
        """Lets `mix` run the local heads, gates them, projects back and sums over devices with other heads."""
        share = self.share(stream)
        params = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        specs = {name: stream.spec(*_cut(name, value.ndim)) for name, value in params.items()}

        def local(params: Params, x: jax.Array, *extras: Any) -> tuple[jax.Array, DeltaCache | None]:
            mine = share.take(params, VALUE_HEADS, KEY_HEADS, LINEAR)
            out, cache = mix(mine, x, *extras)
            z = linear(x, mine["z"])
            out = rms_norm(out.astype(x.dtype), mine["norm"], self.norm_eps)
            out = (out.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
            y = linear(out, mine["o"], axes=2)
            return psum(y, share.axes), cache

        rows, cache_spec = stream.batch_spec, share.cache_spec
        mapped = jax.shard_map(
            local,
            mesh=stream.mesh,
            in_specs=(specs, rows, *(cache_spec if isinstance(e, DeltaCache) else rows for e in extras)),
            out_specs=(rows, cache_spec if returns_cache else None),
            check_vma=True,
        )
        return mapped(params, x, *extras)

    def _inputs(self, params: Params, x: jax.Array, past: Triple | None = None) -> Triple:
        """Queries, keys and values `[B, kernel - 1 + S, heads, H]` before the convolution, after those of the past."""

        def joined(name: str, before: jax.Array | None) -> jax.Array:
            y = linear(x, params[name])
            if before is None:
                return jnp.pad(y, ((0, 0), (self.config.kernel - 1, 0), (0, 0), (0, 0)))
            return jnp.concatenate([jnp.swapaxes(before, 1, 2), y], 1)

        q, k, v = past or (None, None, None)
        return joined("q", q), joined("k", k), joined("v", v)

    def _convolved(self, params: Params, inputs: Triple, restarts: jax.Array | None = None) -> Triple:
        q, k, v = (
            named_activation(convolve(a, params[f"conv_{name}"], restarts), self.config.activation)
            for name, a in zip("qkv", inputs, strict=True)
        )
        return q, k, v


def convolve(
    x: Float[Array, "B KS N H"], weight: Float[Array, "N H kernel"], restarts: Int[Array, "B S"] | None
) -> Float[Array, "B S N H"]:
    """Each channel's own weights over its last `kernel` tokens; `x` begins kernel - 1 tokens early.

    The last weight is the token's own. Tokens from before a restart count as zeros. The sum is in f32.
    """
    kernel = weight.shape[-1]
    length, wide = x.shape[1] - kernel + 1, weight.astype(jnp.float32)
    runs = None if restarts is None else jnp.cumsum(restarts, 1)
    before = None if runs is None else jnp.pad(runs, ((0, 0), (kernel - 1, 0)))
    total = jnp.zeros((), jnp.float32)
    for tap in range(kernel):
        there = x[:, tap : tap + length]
        if runs is not None and before is not None:
            there = _masked(there, before[:, tap : tap + length] == runs)
        total = total + there.astype(jnp.float32) * wide[..., tap]
    return total.astype(x.dtype)


def _rates(params: Params, x: jax.Array) -> tuple[Float[Array, "B S N"], Float[Array, "B S N"]]:
    """The log decay, in f32, and beta, rounded to the model's dtype as transformers does."""
    b, a = (linear(x, params[name]) for name in ("b", "a"))
    speed, bias = (params[name].astype(jnp.float32) for name in ("A_log", "dt_bias"))
    log_decay = -jnp.exp(speed) * jax.nn.softplus(a.astype(jnp.float32) + bias)
    return log_decay, jax.nn.sigmoid(b.astype(jnp.float32)).astype(x.dtype)


def _masked(x: jax.Array, real: jax.Array) -> jax.Array:
    """`x` `[B, S, ...]` with zeros where a token is not `real` `[B, S]`."""
    return jnp.where(jnp.expand_dims(real, range(2, x.ndim)), x, jnp.zeros((), x.dtype))


def _cut(name: str, ndim: int) -> tuple[str | None, ...]:
    """Heads over `tp`."""
    axis = (VALUE_HEADS | KEY_HEADS).get(name)
    return tuple("tp" if dim == axis else None for dim in range(ndim))
