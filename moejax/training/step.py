"""One training step as one compiled program: loss, gradients and the optimizer's update, the state donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.model import Decoder, Lie
from moejax.training.batch import NO_TARGET, Batch
from moejax.training.cross_entropy import cross_entropy


@struct.dataclass
class TrainState:
    """What a step replaces: master weights in f32, and what the optimizer keeps of them, lying as they do."""

    params: Any
    optimizer: Any

    @classmethod
    def of(cls, decoder: Decoder, optimizer: optax.GradientTransformation) -> "TrainState":
        """The first state, from a decoder's parameters, which go into it: those that are f32 are not copied."""
        params = jax.tree.map(_master, nnx.state(decoder, nnx.Param))
        everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
        counted = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), optimizer.init(params))
        return cls(params, counted)


def _master(p: jax.Array) -> jax.Array:
    """In f32, its sharding spelled as compiled programs spell their results', lest the second step compile anew."""
    assert isinstance(p.sharding, NamedSharding)
    spec = list(p.sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return jax.device_put(p.astype(jnp.float32), NamedSharding(p.sharding.mesh, PartitionSpec(*spec)))


def next_token_loss(decoder: Decoder, batch: Batch, lie: Lie) -> Float[Array, ""]:
    """The mean of -log p(target) over all places that have one."""
    x = decoder.hidden_states(batch.tokens, batch.segments, batch.positions, lie)[0][-1]
    counts = (batch.targets != NO_TARGET).astype(jnp.float32)
    weights = counts / jnp.maximum(counts.sum(), 1)
    head, bias = decoder.head()
    return cross_entropy(x, head, bias, batch.targets, weights, decoder.config, lie.stream)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def train_step(
    graph: Any, optimizer: optax.GradientTransformation, lie: Lie, dtype: DTypeLike, state: TrainState, batch: Batch
) -> tuple[TrainState, Float[Array, ""]]:
    """The state after one batch, and the loss before it.

    Args:
      graph: the decoder's structure, from `nnx.split`.
      optimizer: the same object in every step, lest the step compile anew.
      lie: how the batch lies on the mesh.
      dtype: of the forward and backward pass; the master weights and their update are f32 in any case.
      state: consumed.
      batch: `lie.rows` sequences.
    """

    def loss_of(params: Any) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), params))
        return next_token_loss(decoder, batch, lie)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    # optax mixes weak and strong types, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state), loss
