"""One training step as one compiled program: losses, gradients and the optimizer's update, the state donated."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.model import Lie
from moejax.moe.losses import updated_correction
from moejax.stored_forms import StoredForm, stored_forms
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.gradients import Gradients, Params, StepSettings
from moejax.training.state import TrainState


@struct.dataclass
class StepMetrics:
    """What a step tells. L counts the layers that have experts.

    Attributes:
      loss: mean of -log p(target), in nats, without what follows.
      balance_loss: of the routers, as `LossSettings.balance` names it, unweighted; the mean over the parts of a batch.
      z_loss: the same of the routers' z-loss.
      targets: how many there were.
      grad_norm: of all gradients together, before clipping; copies of a parameter counted once.
      finite: whether loss and gradients were; where not, the step changed nothing but its counter.
      bad_layer: the first layer whose output was not finite, or else the last whose gradient was not; -1 for none.
      tokens_per_expert: pairs that the routers chose.
      router_entropy: mean over tokens of the entropy of the softmax over a router's logits, in nats.
      dropped: pairs that found no room; 0 unless a capacity factor was set.
    """

    loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    targets: Int[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]
    bad_layer: Int[Array, ""]
    tokens_per_expert: Int[Array, "L E"]
    router_entropy: Float[Array, " L"]
    dropped: Int[Array, ""]


@dataclass(eq=False)
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
    settings: StepSettings
    _room: Params = field(default_factory=dict, init=False, repr=False)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        room = self._room or self.room(state.params)
        state, metrics, self._room = self.program(state, batch, room)
        return state, metrics

    def room(self, params: Params) -> Params:
        """Role -> memory for its gradient, which stays from step to step; none but on CPU.

        There XLA takes a program's temporaries from the system anew at every call, and each of their pages is cleared
        again: a tenth of a step. Elsewhere it has a pool of its own, of which this would only take away.
        """
        if self.lie.stream.mesh.devices.flat[0].platform != "cpu":
            return {}
        return {role: jnp.zeros_like(param) for role, param in params.items()}

    @functools.cached_property
    def program(self) -> Any:
        """The jitted function of state, batch and room; what it returns lies where state and room were."""
        return jax.jit(self._run, donate_argnums=(0, 2), keep_unused=True)

    def _run(self, state: TrainState, batch: Batch, room: Params) -> tuple[TrainState, StepMetrics, Params]:
        gradients, seen = self._gradients(state.params, batch, jax.random.fold_in(state.key, state.step))
        gradients = {role: self._forms[role].summed(g) for role, g in gradients.items()}
        squares = {role: self._forms[role].square_sum(g) for role, g in gradients.items()}
        norm = jnp.sqrt(sum(squares.values(), jnp.float32(0)))
        finite = jnp.isfinite(seen.nats) & jnp.isfinite(norm)
        if (limit := self.settings.clip) is not None:
            scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            gradients = {role: g * scale for role, g in gradients.items()}
        # Not a choice between old and new arrays, for which the compiler would keep copies of the whole state.
        new = lax.cond(finite, self._updated, lambda state, *_: state, state, gradients, seen.tokens_per_expert)
        metrics = StepMetrics(
            loss=seen.nats,
            balance_loss=seen.balance,
            z_loss=seen.z,
            targets=(batch.targets != NO_TARGET).sum(dtype=jnp.int32),
            grad_norm=norm,
            finite=finite,
            bad_layer=_bad_layer(seen.broken, squares),
            tokens_per_expert=seen.tokens_per_expert,
            router_entropy=seen.entropy / jnp.maximum(seen.tokens, 1).astype(jnp.float32),
            dropped=seen.dropped,
        )
        return replace(new, step=state.step + 1), metrics, {role: gradients[role] for role in room}

    def _updated(self, state: TrainState, gradients: Params, tokens_per_expert: jax.Array) -> TrainState:
        # optax mixes weak and strong types, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        # Corrections follow the load alone, whatever the optimizer would make of them.
        rate = self.settings.losses.bias_update_rate
        sparse = [index for index, layer in enumerate(self.config.layers) if layer.moe is not None]
        for index, load in zip(sparse, tokens_per_expert, strict=True):
            if (old := state.params.get(role := f"layers.{index}.moe.correction")) is not None:
                params[role] = updated_correction(old, load[: old.size], rate)
        return replace(state, params=params, optimizer=optimizer)

    @functools.cached_property
    def _gradients(self) -> Gradients:
        return Gradients(self.config, self.lie, self.settings)

    @functools.cached_property
    def _forms(self) -> dict[str, StoredForm]:
        return stored_forms(self.config, self.lie.stream.mesh)


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
