"""The decoder: embedding, layers, head. Pure computation on a mesh; files, text and loops are elsewhere."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.moe.auto import Choice, check_strategy, choose
from moejax.moe.layer import MoEDetails, Parallel, sharded_param
from moejax.nn.block import Block
from moejax.nn.cache import LayerCache
from moejax.nn.embedding import embed, head_logits
from moejax.nn.norm import rms_norm
from moejax.nn.rope import rope_tables
from moejax.nn.stream import Stream
from moejax.sharding import place, round_up


@dataclass(frozen=True, slots=True)
class Options:
    """How the mixture-of-experts blocks of a model run; the fields are those of `moejax.moe`."""

    strategy: str = "auto"
    capacity_factor: float | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise MoejaxError(f"capacity_factor={self.capacity_factor} must be above 0 (1.25 is usual)")
        if self.chunks < 1:
            raise MoejaxError(f"chunks={self.chunks} must be at least 1")


@dataclass(frozen=True, slots=True)
class Lie:
    """How one batch lies on the mesh: the stream, the strategy that follows, and the rows with their padding."""

    stream: Stream
    choice: Choice
    rows: int
    parallel: Parallel


def lay(batch: int, mesh: Mesh, options: Options) -> Lie:
    """Decides, from static shapes, how `batch` sequences run.

    Rows are cut over `ep` where it divides them, and always under `all_to_all`, which fills up with empty rows; under
    `all_reduce` every device of `ep` holds all rows.

    Raises:
      MoejaxError: an unknown strategy.
    """
    ep = mesh.shape["ep"]
    if options.strategy == "auto" and options.capacity_factor is not None:
        choice = Choice("all_to_all", "capacity_factor was asked for")
    else:
        choice = choose(options.strategy, batch, ep)
    cut = choice.strategy == "all_to_all"
    parallel = Parallel(
        batch_axes=("ep",) if cut else (),
        strategy=choice.strategy,
        capacity_factor=options.capacity_factor,
        chunks=options.chunks if cut else 1,
    )
    return Lie(Stream(mesh, cut and ep > 1), choice, round_up(batch, ep) if cut else batch, parallel)


@struct.dataclass
class Forward:
    """What a forward pass gives. The tuples are empty unless they were asked for.

    Attributes:
      logits: f32.
      router_logits: for each sparse layer, f32 `[B * S, E]`, as transformers gives them.
      routed_experts: for each sparse layer, the chosen experts, int32 `[B * S, K]`; -1 for padding.
      hidden_states: the embeddings, then each layer's output, the last one after the final norm, `[B, S, D]` each.
      dropped: pairs dropped in all layers together, int32; 0 unless a capacity factor was set.
    """

    logits: Float[Array, "B S V"]
    router_logits: tuple[Float[Array, "T E"], ...]
    routed_experts: tuple[Int[Array, "T K"], ...]
    hidden_states: tuple[Float[Array, "B S D"], ...]
    dropped: Int[Array, ""]


class Decoder(nnx.Module):
    """A decoder-only mixture-of-experts language model on an ("ep", "tp") mesh.

    Parameters: `embed [V, D]`, `layers` (nnx.List of Block), `norm [D]` and, unless embeddings are tied, `lm_head
    [V, D]`.
    """

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        """Random weights in `dtype`."""
        self.config = config
        rows = round_up(config.vocab_size, mesh.shape["tp"])

        def table() -> nnx.Param:
            value = jax.random.normal(rngs.params(), (rows, config.hidden_size), dtype)
            return sharded_param(value * jnp.asarray(config.hidden_size**-0.5, dtype), mesh, "tp", None)

        self.embed = table()
        self.layers = nnx.List([Block(config, i, mesh=mesh, rngs=rngs, dtype=dtype) for i in range(config.num_layers)])
        self.norm = sharded_param(jnp.ones(config.hidden_size, dtype), mesh, None)
        self.lm_head = None if config.tie_word_embeddings else table()

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        lie: Lie,
        *,
        router_logits: bool = False,
        hidden_states: bool = False,
    ) -> Forward:
        """Logits of whole sequences. B is `lie.rows`; segment 0 is padding, positions feed the rotary embedding."""
        lengths = jnp.where(segments > 0, positions, 0).max(-1) + 1
        rope = self._rope(positions, lengths)
        x, states, details = self._embed(tokens, lie), [], []
        for layer in self.layers:
            states.append(x)
            x, detail = layer(x, rope, segments, lie.stream, lie.parallel)
            x = place(x, lie.stream.mesh, lie.stream.batch_spec)
            details.append(detail)
        x = rms_norm(x, self.norm[...], self.config.norm_eps)
        sparse = [d for d in details if d is not None]
        return Forward(
            logits=self._logits(x, lie),
            router_logits=tuple(_flat(d.router_logits) for d in sparse) if router_logits else (),
            routed_experts=tuple(_flat(d.routing.experts) for d in sparse) if router_logits else (),
            hidden_states=(*states, x) if hidden_states else (),
            dropped=_dropped(details),
        )

    def prefill(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], max_len: int, lie: Lie
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...], Int[Array, ""]]:
        """The logits after each right-padded prompt, a cache with room for `max_len` tokens, and dropped pairs."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rope = self._rope(positions, lengths)
        last = jnp.maximum(lengths - 1, 0)

        def run(layer: Block, x: jax.Array) -> tuple[jax.Array, LayerCache, MoEDetails | None]:
            return layer.prefill(x, rope, lengths, max_len, lie.stream, lie.parallel)

        x, caches, dropped = self._through(self._embed(tokens, lie), [run] * len(self.layers), lie)
        x = jnp.take_along_axis(x, last[:, None, None], 1)
        return self._logits(rms_norm(x, self.norm[...], self.config.norm_eps), lie)[:, 0], caches, dropped

    def decode(
        self,
        tokens: Int[Array, " B"],
        positions: Int[Array, " B"],
        active: Bool[Array, " B"],
        caches: tuple[LayerCache, ...],
        lie: Lie,
    ) -> tuple[Float[Array, "B V"], tuple[LayerCache, ...], Int[Array, ""]]:
        """The logits after one more token a row, at `positions`; rows that are not active are routed nowhere."""
        rope = self._rope(positions[:, None], positions + 1)

        def step(cache: LayerCache) -> Callable[[Block, jax.Array], tuple[jax.Array, LayerCache, MoEDetails | None]]:
            return lambda layer, x: layer.decode(x, rope, positions, active, cache, lie.stream, lie.parallel)

        x, new, dropped = self._through(self._embed(tokens[:, None], lie), [step(cache) for cache in caches], lie)
        return self._logits(rms_norm(x, self.norm[...], self.config.norm_eps), lie)[:, 0], new, dropped

    def _through(
        self, x: jax.Array, steps: list[Callable[[Block, jax.Array], tuple]], lie: Lie
    ) -> tuple[jax.Array, tuple[LayerCache, ...], jax.Array]:
        caches, details = [], []
        for layer, step in zip(self.layers, steps, strict=True):
            x, cache, detail = step(layer, x)
            x = place(x, lie.stream.mesh, lie.stream.batch_spec)
            caches.append(cache)
            details.append(detail)
        return x, tuple(caches), _dropped(details)

    def _embed(self, tokens: jax.Array, lie: Lie) -> jax.Array:
        with jax.named_scope("embed"):
            return embed(tokens, self.embed[...], lie.stream)

    def _logits(self, x: jax.Array, lie: Lie) -> jax.Array:
        with jax.named_scope("lm_head"):
            head = self.embed if self.lm_head is None else self.lm_head
            return head_logits(x, head[...], self.config.vocab_size, lie.stream)

    def _rope(self, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        return rope_tables(config.rope, config.attention.head_dim, config.max_position_embeddings, positions, lengths)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _dropped(details: list[MoEDetails | None]) -> jax.Array:
    return sum((d.accounting.dropped for d in details if d is not None), jnp.int32(0))
