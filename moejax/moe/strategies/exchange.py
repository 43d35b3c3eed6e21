"""The repeated exchange of `all_to_all`: rows to their experts and back, as often as the fullest cell needs."""

import functools
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch import DispatchPlan
from moejax.moe.params import ExpertParams
from moejax.moe.strategies.cells import Cells
from moejax.moe.strategies.local import Local
from moejax.moe.strategies.shares import gather_share
from moejax.moe.strategies.slices import Slice, swap
from moejax.sharding import varying

T = TypeVar("T")
Values: TypeAlias = tuple[jax.Array, jax.Array, ExpertParams]
"""What gradients flow to: shares of the tokens, routing weights, and the experts of this device."""
_NOTHING: Any = None  # under way before the first slice and after the last


def exchange(
    share: Float[Array, "T d"],
    plan: DispatchPlan,
    counts: Int[Array, "P S"],
    waves: Int[Array, ""],
    params: ExpertParams,
    cells: Cells,
    local: Local,
) -> Float[Array, "T d"]:
    """Sends each pair's share of x to its expert and brings the result back, weighted and summed over a token's
    experts.

    Args:
      share: what this device puts on the wire of each of its tokens.
      plan: its pairs by slot.
      counts: pairs of every sender for every slot.
      waves: how often to exchange.

    Returns:
      The sum over each token's experts: this device's share of D, or a partial sum over the tensor axis of whole rows.
    """
    # Marked as varying along all axes before the custom gradient, so that the marks' own transpose sums over them.
    axes = local.ep_axes + local.tp_axes + local.others
    values = jax.tree.map(lambda a: varying(a, axes), (share, plan.weights, local.routed(params)))
    cell, place = cells.places(plan, local.ep_size * local.chunks)
    received = lax.dynamic_index_in_dim(by_slice(counts, local), local.ep_index(), keepdims=False)
    indices = tuple(varying(a, axes) for a in (cell, place, received))
    if _can_overflow(plan.weights, cells):
        return _repeated(values, indices, waves, cells, local)
    return _wave(values, indices, jnp.int32(0), cells, local)


def _wave(values: Values, indices: tuple[jax.Array, ...], wave: jax.Array, cells: Cells, local: Local) -> jax.Array:
    """One exchange there and back: the part of the sum that this wave carries.

    In `chunks` slices of the experts it is a pipeline: while the first half of a slice is computed, the slice before
    goes back, and during the second half the next one arrives.
    """
    share, weights, experts = values
    slices = [Slice(chunk, weights, indices, wave, cells, local) for chunk in range(local.chunks)]
    parts, leaving, arriving = [], _NOTHING, swap(slices[0].send(share), local)
    for this, following, before in zip(slices, [*slices[1:], None], [None, *slices[:-1]], strict=True):
        rows = gather_share(arriving, experts.gate_up.shape[1], local)
        rows, leaving, share = _together((rows, leaving, share), local)
        inner = this.gate_up(rows, experts)
        returned = swap(leaving, local) if before else _NOTHING
        inner, returned, share = _together((inner, returned, share), local)
        outputs = this.down(inner, experts)
        arriving = swap(following.send(share), local) if following else _NOTHING
        outputs, arriving, share = _together((outputs, arriving, share), local)
        leaving = this.reply(outputs)
        if before:
            parts.append(before.combine(returned))
    parts.append(slices[-1].combine(swap(leaving, local)))
    return functools.reduce(jnp.add, parts)


def _together(stage: T, local: Local) -> T:
    """Ends a stage of the pipeline. Without, the compiler merges collectives of several slices into one, or puts all
    transfers before all products."""
    return stage if local.chunks == 1 else lax.optimization_barrier(stage)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _repeated(
    values: Values, indices: tuple[jax.Array, ...], waves: jax.Array, cells: Cells, local: Local
) -> jax.Array:
    """The first wave, then as many more as the fullest cell needs."""
    return _more_waves(values, indices, waves, _wave(values, indices, jnp.int32(0), cells, local), cells, local)


def _more_waves(
    values: Values,
    indices: tuple[jax.Array, ...],
    waves: jax.Array,
    first: jax.Array,
    cells: Cells,
    local: Local,
) -> jax.Array:
    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, state[1] + _wave(values, indices, state[0], cells, local)

    return lax.while_loop(lambda state: state[0] < waves, step, (jnp.int32(1), first))[1]


def _repeated_forward(
    values: Values, indices: tuple[jax.Array, ...], waves: jax.Array, cells: Cells, local: Local
) -> tuple[jax.Array, Any]:
    first, pullback = jax.vjp(lambda *v: _wave(v, indices, jnp.int32(0), cells, local), *values)
    return _more_waves(values, indices, waves, first, cells, local), (pullback, values, indices, waves)


def _repeated_backward(cells: Cells, local: Local, saved: Any, dy: jax.Array) -> tuple[Any, None, None]:
    """The first wave's residuals were kept; later waves, which are rare, are computed again."""
    pullback, values, indices, waves = saved

    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        wave, total = state
        _, pull = jax.vjp(lambda *v: _wave(v, indices, wave, cells, local), *values)
        return wave + 1, jax.tree.map(jnp.add, total, pull(dy))

    grads = lax.while_loop(lambda state: state[0] < waves, step, (jnp.int32(1), pullback(dy)))[1]
    return grads, None, None


_repeated.defvjp(_repeated_forward, _repeated_backward)


def _can_overflow(weights: Float[Array, "T K"], cells: Cells) -> bool:
    """Whether any routing at all could overflow a cell."""
    return cells.per_expert is None and cells.rows < weights.size


def by_slice(counts: Int[Array, "P S"], local: Local) -> Int[Array, "P_to P_from n L"]:
    """Counts of (sender, slot) as (receiver, sender, chunk, slot of the chunk)."""
    return counts.reshape(counts.shape[0], local.ep_size, local.chunks, -1).swapaxes(0, 1)
