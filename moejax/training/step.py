"""One training step as one compiled program: losses, gradients and the optimizer's update, the state donated."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder
from moejax.model import Decoder, Lie
from moejax.sharding import pad_axis, place
from moejax.stored_forms import StoredForm, stored_forms
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.cross_entropy import cross_entropy
from moejax.training.state import TrainState, decoder_of
from moejax.training.zero import spread

Params: TypeAlias = Mapping[str, jax.Array]


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step computes.

    Attributes:
      dtype: of the forward and backward pass; master weights, their update and all losses are f32 in any case.
      clip: the norm that gradients are scaled down to, or None.
      remat: computes each layer's activations again in the backward pass instead of keeping them. What came over the
        mesh is kept, so that no collective runs twice.
    """

    dtype: DTypeLike = jnp.float32
    clip: float | None = None
    remat: bool = False


@struct.dataclass
class StepMetrics:
    """What a step tells. L counts the layers that have experts.

    Attributes:
      loss: mean of -log p(target), in nats.
      targets: how many there were.
      grad_norm: of all gradients together, before clipping; copies of a parameter counted once.
      finite: whether loss and gradients were; where not, the step changed nothing but its counter.
      bad_layer: the first layer whose output was not finite, or else the last whose gradient was not; -1 for none.
      tokens_per_expert: pairs that the routers chose.
      router_entropy: mean over tokens of the entropy of the softmax over a router's logits, in nats.
      dropped: pairs that found no room; 0 unless a capacity factor was set.
    """

    loss: Float[Array, ""]
    targets: Int[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    bad_layer: Int[Array, ""]
    tokens_per_expert: Int[Array, "L E"]
    router_entropy: Float[Array, " L"]
    dropped: Int[Array, ""]


@struct.dataclass
class _Seen:
    """What one pass over a part of the batch shows, to be added up over parts; entropies are sums over tokens."""

    nats: Float[Array, ""]
    tokens_per_expert: Int[Array, "L E"]
    entropy: Float[Array, " L"]
    tokens: Int[Array, ""]
    dropped: Int[Array, ""]
    broken: Bool[Array, " layers"]


@dataclass(frozen=True, eq=False)
class TrainStep:
    """`step(state, batch) -> (state, metrics)`, compiled at its first call; the state is consumed.

    The batch's arrays are `[A, lie.rows, S]`: A parts whose gradients are summed before the one update, as if all
    targets had been in one batch.

    Attributes:
      config: of the model.
      lie: how a part of the batch lies on the mesh.
      optimizer: without clipping, which is the step's: on a mesh a parameter may be there more than once.
      settings: see there.
    """

    config: ModelConfig
    lie: Lie
    optimizer: optax.GradientTransformation
    settings: StepSettings = StepSettings()

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return self.program(state, batch)

    @functools.cached_property
    def program(self) -> Any:
        """The jitted function."""
        return jax.jit(self._run, donate_argnums=0)

    def _run(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        gradients, seen = self._gradients(state, batch)
        gradients = {role: self._forms[role].summed(g) for role, g in gradients.items()}
        squares = {role: self._forms[role].square_sum(g) for role, g in gradients.items()}
        norm = jnp.sqrt(sum(squares.values(), jnp.float32(0)))
        finite = jnp.isfinite(seen.nats) & jnp.isfinite(norm)
        if (limit := self.settings.clip) is not None:
            scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            gradients = {role: g * scale for role, g in gradients.items()}
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), self._updated(state, gradients), state)
        metrics = StepMetrics(
            loss=seen.nats,
            targets=(batch.targets != NO_TARGET).sum(dtype=jnp.int32),
            grad_norm=norm,
            finite=finite,
            bad_layer=_bad_layer(seen.broken, squares),
            tokens_per_expert=seen.tokens_per_expert,
            router_entropy=seen.entropy / jnp.maximum(seen.tokens, 1).astype(jnp.float32),
            dropped=seen.dropped,
        )
        return replace(new, step=state.step + 1), metrics

    def _gradients(self, state: TrainState, batch: Batch) -> tuple[Params, _Seen]:
        """Summed over the parts, f32, lying as the masters do."""
        mesh, dtype = self.lie.stream.mesh, self.settings.dtype
        targets = (batch.targets != NO_TARGET).sum(dtype=jnp.int32)
        # In the dtype of the pass, and put together along ep: once, for all parts.
        params = {
            role: place(p.astype(dtype), mesh, self._leaves[role].sharding.spec) for role, p in state.params.items()
        }

        def of_part(part: Batch) -> tuple[Params, _Seen]:
            gradients, seen = jax.grad(self._objective, has_aux=True)(params, part, targets)
            spreads = {role: spread(leaf, mesh).spec for role, leaf in self._leaves.items()}
            return {role: place(g.astype(jnp.float32), mesh, spreads[role]) for role, g in gradients.items()}, seen

        if batch.tokens.shape[0] == 1:
            return of_part(jax.tree.map(lambda a: a[0], batch))
        first = jax.eval_shape(of_part, jax.tree.map(lambda a: a[0], batch))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)
        return lax.scan(lambda total, part: (jax.tree.map(_plus, total, of_part(part)), None), nothing, batch)[0]

    def _objective(self, params: Params, batch: Batch, targets: jax.Array) -> tuple[jax.Array, _Seen]:
        decoder = decoder_of(self._graph, self._paths, params)
        states, details = decoder.hidden_states(
            batch.tokens, batch.segments, batch.positions, self.lie, self.settings.remat
        )
        nats = next_token_loss(decoder, states[-1], batch, self.lie, targets)
        real = batch.segments > 0
        sparse = [d for d in details if d is not None]
        return nats, _Seen(
            nats=nats,
            tokens_per_expert=_stacked([d.accounting.tokens_per_expert for d in sparse]),
            entropy=jnp.stack([_entropy(d.router_logits, real) for d in sparse]),
            tokens=real.sum(dtype=jnp.int32),
            dropped=sum((d.accounting.dropped for d in sparse), jnp.int32(0)),
            broken=jnp.stack([~jnp.isfinite(x).all() for x in states[1:]]),
        )

    def _updated(self, state: TrainState, gradients: Params) -> TrainState:
        # optax mixes weak and strong types, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        return replace(state, params=params, optimizer=optimizer)

    @functools.cached_property
    def _abstract(self) -> tuple[Any, dict[tuple, jax.ShapeDtypeStruct]]:
        return abstract_decoder(self.config, self.lie.stream.mesh, self.settings.dtype)

    @property
    def _graph(self) -> Any:
        return self._abstract[0]

    @functools.cached_property
    def _paths(self) -> dict[str, tuple[Any, ...]]:
        return {role_of(path): path for path in self._abstract[1]}

    @functools.cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {role_of(path): leaf for path, leaf in self._abstract[1].items()}

    @functools.cached_property
    def _forms(self) -> dict[str, StoredForm]:
        return stored_forms(self.config, self.lie.stream.mesh)


def next_token_loss(
    decoder: Decoder, x: Float[Array, "B S D"], batch: Batch, lie: Lie, targets: Int[Array, ""]
) -> Float[Array, ""]:
    """The sum of -log p(target) over all places that have one, divided by `targets`, from the last hidden states."""
    hits = (batch.targets != NO_TARGET).astype(jnp.float32)
    weights = hits / jnp.maximum(targets, 1).astype(jnp.float32)
    head, bias = decoder.head()
    return cross_entropy(x, head, bias, batch.targets, weights, decoder.config, lie.stream)


def _entropy(logits: Float[Array, "B S E"], real: Bool[Array, "B S"]) -> Float[Array, ""]:
    """Summed over real tokens."""
    log_p = jax.nn.log_softmax(lax.stop_gradient(logits))
    return -jnp.where(real[..., None], jnp.exp(log_p) * log_p, 0.0).sum()


def _stacked(counts: list[Int[Array, " E"]]) -> Int[Array, "L E"]:
    """Layers of fewer experts than others filled up with experts that no token goes to."""
    most = max(c.size for c in counts)
    return jnp.stack([pad_axis(c, 0, most) for c in counts])


def _plus(a: jax.Array, b: jax.Array) -> jax.Array:
    return a | b if a.dtype == bool else a + b


def _bad_layer(broken: Bool[Array, " layers"], squares: Mapping[str, jax.Array]) -> Int[Array, ""]:
    """The first layer with an output that is not finite, or else the last with such a gradient; -1 for none."""
    sums = [jnp.float32(0)] * broken.size
    for role, square in squares.items():
        part, _, rest = role.partition(".")
        if part == "layers":
            index = int(rest.partition(".")[0])
            sums[index] = sums[index] + square
    layers = jnp.arange(broken.size, dtype=jnp.int32)
    last = jnp.where(jnp.isfinite(jnp.stack(sums)), jnp.int32(-1), layers).max()
    return jnp.where(broken.any(), jnp.argmax(broken).astype(jnp.int32), last)
