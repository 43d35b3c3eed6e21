"""The decoder: embedding, layers, head. Pure computation on a mesh; files, text and loops are elsewhere."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.moe.auto import Choice, check_strategy, choose
from moejax.moe.jitter import Jitter
from moejax.moe.layer import MoEDetails, Parallel
from moejax.moe.router import Router
from moejax.moe.usage import dropped_pairs
from moejax.nn.block import Block
from moejax.nn.cache import Cache
from moejax.nn.embedding import embed, head_logits
from moejax.nn.norm import Norm
from moejax.nn.places import Places
from moejax.nn.stream import Stream
from moejax.sharding import COLLECTIVE, AnyMesh, place, round_up, sharded_param


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

    Parameters: `embed [V, D]`, `layers` (nnx.List of Block), `norm`, unless embeddings are tied `lm_head [V, D]`, and
    `lm_head_bias [V]` where the config has one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        router: Router | None = None,
    ):
        """Random weights in `dtype`; `router` replaces the config's in all layers, see `MoE`."""
        self.config = config
        rows = round_up(config.vocab_size, mesh.shape["tp"])

        def table() -> nnx.Param:
            value = jax.random.normal(rngs.params(), (rows, config.hidden_size), dtype)
            return sharded_param(value * jnp.asarray(config.hidden_size**-0.5, dtype), mesh, "tp", None)

        self.embed = table()
        self.layers = nnx.List(
            [Block(config, i, mesh=mesh, rngs=rngs, dtype=dtype, router=router) for i in range(config.num_layers)]
        )
        self.norm = Norm(config.norm, config.hidden_size, mesh=mesh, dtype=dtype)
        self.lm_head = None if config.tie_word_embeddings else table()
        self.lm_head_bias = sharded_param(jnp.zeros(rows, dtype), mesh, "tp") if config.head_bias else None

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
        states, details = self.hidden_states(tokens, segments, positions, lie)
        sparse = [d for d in details if d is not None]
        return Forward(
            logits=self._logits(states[-1], lie),
            router_logits=tuple(_flat(d.router_logits) for d in sparse) if router_logits else (),
            routed_experts=tuple(_flat(d.routing.experts) for d in sparse) if router_logits else (),
            hidden_states=states if hidden_states else (),
            dropped=dropped_pairs(details),
        )

    def hidden_states(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        lie: Lie,
        jitter: Jitter | None = None,
        remat: bool = False,
    ) -> tuple[tuple[Float[Array, "B S D"], ...], list[MoEDetails | None]]:
        """The embeddings and each layer's output, the last one after the final norm; each layer's details.

        `jitter`, for training, puts noise on what the routers read, in each layer its own. With `remat`, a backward
        pass computes what is inside layers again, but for what came over the mesh.
        """
        lengths = jnp.where(segments > 0, positions, 0).max(-1) + 1
        places = Places.of(self.config, positions, lengths)
        x, states, details = self._embed(tokens, lie), [], []
        for index, layer in enumerate(self.layers):
            states.append(x)
            noise = None if jitter is None else jitter.of_layer(index)
            run = _forgetful(layer) if remat else layer
            x, detail = run(x, places, segments, lie.stream, lie.parallel, noise)
            x = place(x, lie.stream.mesh, lie.stream.batch_spec)
            details.append(detail)
        return (*states, self.norm(x)), details

    def head(self) -> tuple[Float[Array, "Vp D"], Float[Array, " Vp"] | None]:
        """The table that gives logits, which may be the embedding's, and their bias."""
        table = self.embed if self.lm_head is None else self.lm_head
        return table[...], None if self.lm_head_bias is None else self.lm_head_bias[...]

    def empty_caches(self, max_len: int, lie: Lie) -> tuple[Cache, ...]:
        """A cache of no tokens for each layer, with room for `max_len` in a row."""
        dtype = self.embed.dtype
        return tuple(layer.empty_cache(lie.rows, max_len, dtype, lie.stream) for layer in self.layers)

    def extend(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        lengths: Int[Array, " B"],
        caches: tuple[Cache, ...],
        lie: Lie,
    ) -> tuple[Float[Array, "B V"], tuple[Cache, ...], Int[Array, ""]]:
        """Runs S more tokens a row over the caches of those before: a chunk of the prompts, or one token to decode.

        Args:
          tokens: padding may be anything.
          positions: those that follow on the row's cache; -1 is padding, which only follows a row's tokens.
          lengths: of the row that the tokens belong to, later chunks of it included; some rotary tables follow it.
          caches: from `empty_caches` or the last call.

        Returns:
          The logits after each row's last token here (of no meaning for a row of padding), the caches, dropped pairs.
        """
        places = Places.of(self.config, positions, lengths)
        x, new, details = self._embed(tokens, lie), [], []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache, detail = layer.extend(x, places, cache, lie.stream, lie.parallel)
            x = place(x, lie.stream.mesh, lie.stream.batch_spec)
            new.append(cache)
            details.append(detail)
        last = jnp.maximum((positions >= 0).sum(1, dtype=jnp.int32) - 1, 0)
        x = jnp.take_along_axis(x, last[:, None, None], 1)
        return self._logits(self.norm(x), lie)[:, 0], tuple(new), dropped_pairs(details)

    def _embed(self, tokens: jax.Array, lie: Lie) -> jax.Array:
        with jax.named_scope("embed"):
            x = embed(tokens, self.embed[...], lie.stream)
            scale = self.config.embedding_scale
            return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def _logits(self, x: jax.Array, lie: Lie) -> jax.Array:
        config = self.config
        with jax.named_scope("lm_head"):
            head, bias = self.head()
            logits = head_logits(x, head, config.vocab_size, lie.stream)
            return finished_logits(logits, None if bias is None else bias[: config.vocab_size], config)


def _forgetful(layer: Block) -> Callable[..., tuple[jax.Array, MoEDetails | None]]:
    """The layer, of which a backward pass finds only its inputs and the results of collectives."""
    graph, params = nnx.split(layer)

    def run(x: jax.Array, *others: Any) -> tuple[jax.Array, MoEDetails | None]:
        policy = jax.checkpoint_policies.save_only_these_names(COLLECTIVE)
        return jax.checkpoint(lambda params, x: nnx.merge(graph, params)(x, *others), policy=policy)(params, x)

    return run


def finished_logits(logits: Float[Array, "*T V"], bias: Float[Array, " V"] | None, config: ModelConfig) -> jax.Array:
    """Logits (f32) as the config wants them: biased, scaled, bounded."""
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if config.logits_scale != 1:
        logits = logits * config.logits_scale
    if (cap := config.logits_softcap) is not None:
        logits = cap * jnp.tanh(logits / cap)
    return logits


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
