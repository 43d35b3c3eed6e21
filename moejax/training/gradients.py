"""The gradients of one batch: a pass forward and back over each of its parts, summed."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import ModelConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder
from moejax.model import Decoder, Lie
from moejax.moe.balance import router_views
from moejax.moe.jitter import Jitter
from moejax.moe.layer import MoEDetails
from moejax.moe.losses import LossSettings, router_losses, weighted_sum
from moejax.moe.usage import dropped_pairs, entropy_sums, pairs_by_expert
from moejax.named_function import named_function
from moejax.sharding import place
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.cross_entropy import cross_entropy
from moejax.training.state import decoder_of
from moejax.training.zero import spread

Params: TypeAlias = Mapping[str, jax.Array]
"""Role -> array."""

NO_LOSSES = LossSettings(balance="none")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step computes.

    Attributes:
      dtype: of the forward and backward pass; master weights, their update and all losses are f32 in any case.
      clip: the norm that gradients are scaled down to, or None.
      losses: what is asked of the routers beside.
      remat: computes each layer's activations again in the backward pass instead of keeping them. What came over the
        mesh is kept, so that no collective runs twice.
    """

    dtype: DTypeLike = jnp.float32
    clip: float | None = None
    losses: LossSettings = NO_LOSSES
    remat: bool = False


@struct.dataclass
class Seen:
    """What one pass over a part of the batch shows, to be added up over parts; entropies are sums over tokens."""

    nats: Float[Array, ""]
    balance: Float[Array, ""]
    z: Float[Array, ""]
    tokens_per_expert: Int[Array, "L E"]
    entropy: Float[Array, " L"]
    tokens: Int[Array, ""]
    dropped: Int[Array, ""]
    broken: Bool[Array, " layers"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """`gradients(masters, batch, key) -> (gradients, seen)`: f32, lying as the masters do.

    Attributes:
      config: of the model.
      lie: how a part of the batch lies on the mesh.
      settings: see there.
    """

    config: ModelConfig
    lie: Lie
    settings: StepSettings

    def __call__(self, masters: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Params, Seen]:
        """Of a batch of `[A, lie.rows, S]`: A parts, one after the other, as if all targets had been in one."""
        parts, mesh = batch.tokens.shape[0], self.lie.stream.mesh
        # In the dtype of the pass, and put together along ep: once, for all parts.
        params = {role: place(masters[role].astype(a.dtype), mesh, a.sharding.spec) for role, a in self._leaves.items()}
        spreads = {role: spread(leaf, mesh).spec for role, leaf in self._leaves.items()}
        targets = (batch.targets != NO_TARGET).sum(dtype=jnp.int32)

        def of_part(part: Batch, index: jax.Array, earlier: Seen | None) -> tuple[Params, Seen]:
            amount = self.settings.losses.jitter
            jitter = Jitter(jax.random.fold_in(key, index), amount) if amount else None
            differentiated = jax.grad(self._objective, has_aux=True)
            gradients, seen = differentiated(params, part, targets, parts, jitter, earlier)
            return {role: place(g.astype(jnp.float32), mesh, spreads[role]) for role, g in gradients.items()}, seen

        if parts == 1:
            return of_part(jax.tree.map(lambda a: a[0], batch), jnp.int32(0), None)
        each = (batch, jnp.arange(parts, dtype=jnp.int32))
        one = jax.eval_shape(of_part, *jax.tree.map(lambda a: a[0], each), None)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)

        def add(total: tuple[Params, Seen], part: tuple[Batch, jax.Array]) -> tuple[tuple[Params, Seen], None]:
            return jax.tree.map(_plus, total, of_part(*part, total[1])), None

        return lax.scan(add, nothing, each)[0]

    def _objective(
        self,
        params: Params,
        batch: Batch,
        targets: jax.Array,
        parts: int,
        jitter: Jitter | None,
        earlier: Seen | None,
    ) -> tuple[jax.Array, Seen]:
        """This part's share of the loss; `earlier` is what the parts before it have shown together."""
        decoder = decoder_of(self._graph, self._paths, params)
        states, details = decoder.hidden_states(
            batch.tokens, batch.segments, batch.positions, self.lie, jitter, self.settings.remat
        )
        nats = next_token_loss(decoder, states[-1], batch, self.lie, targets)
        losses = self._router_losses(details, batch, earlier)
        losses = {name: loss / parts for name, loss in losses.items()}
        real = batch.segments > 0
        return nats + weighted_sum(losses, self.settings.losses), Seen(
            nats=nats,
            balance=losses["balance"],
            z=losses["z"],
            tokens_per_expert=pairs_by_expert(details),
            entropy=entropy_sums(details, real),
            tokens=real.sum(dtype=jnp.int32),
            dropped=dropped_pairs(details),
            broken=jnp.stack([~jnp.isfinite(x).all() for x in states[1:]]),
        )

    def _router_losses(
        self, details: list[MoEDetails | None], batch: Batch, earlier: Seen | None
    ) -> dict[str, Float[Array, ""]]:
        widths = [d.accounting.tokens_per_expert.size for d in details if d is not None]
        counts = None if earlier is None else [c[:n] for c, n in zip(earlier.tokens_per_expert, widths, strict=True)]
        return router_losses(self.settings.losses)(router_views(details, batch.segments, self.config, counts))

    @functools.cached_property
    def _abstract(self) -> tuple[Any, dict[tuple, jax.ShapeDtypeStruct]]:
        named = self.settings.losses.router
        router = None if named is None else named_function(named, "router")
        return abstract_decoder(self.config, self.lie.stream.mesh, self.settings.dtype, router)

    @property
    def _graph(self) -> Any:
        return self._abstract[0]

    @functools.cached_property
    def _paths(self) -> dict[str, tuple[Any, ...]]:
        return {role_of(path): path for path in self._abstract[1]}

    @functools.cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {role_of(path): leaf for path, leaf in self._abstract[1].items()}


def next_token_loss(
    decoder: Decoder, x: Float[Array, "B S D"], batch: Batch, lie: Lie, targets: Int[Array, ""]
) -> Float[Array, ""]:
    """The sum of -log p(target) over all places that have one, divided by `targets`, from the last hidden states."""
    hits = (batch.targets != NO_TARGET).astype(jnp.float32)
    weights = hits / jnp.maximum(targets, 1).astype(jnp.float32)
    head, bias = decoder.head()
    return cross_entropy(x, head, bias, batch.targets, weights, decoder.config, lie.stream)


def _plus(a: jax.Array, b: jax.Array) -> jax.Array:
    return a | b if a.dtype == bool else a + b
