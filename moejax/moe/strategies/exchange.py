"""The repeated exchange of `all_to_all`: rows to their experts and back, as often as the fullest cell needs."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch import DispatchPlan
from moejax.moe.experts import grouped_mlp
from moejax.moe.params import ExpertParams
from moejax.moe.strategies.cells import Cells, grouped_rows
from moejax.moe.strategies.local import Local
from moejax.moe.strategies.shares import gather_share, scatter_share
from moejax.moe.strategies.weighing import combine, weigh_inputs
from moejax.sharding import varying

Values: TypeAlias = tuple[jax.Array, jax.Array, ExpertParams]
"""What gradients flow to: shares of the tokens, routing weights, and the experts of this device."""


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
    """One exchange there and back, in `chunks` slices of the experts: the part of the sum that this wave carries."""
    parts = [_slice_wave(values, indices, wave, chunk, cells, local) for chunk in range(local.chunks)]
    return functools.reduce(jnp.add, parts)


def _slice_wave(
    values: Values,
    indices: tuple[jax.Array, ...],
    wave: jax.Array,
    chunk: int,
    cells: Cells,
    local: Local,
) -> jax.Array:
    share, weights, experts = values
    cell, place, received = indices
    slots = local.placement.slots_per_device // local.chunks
    mine = jax.tree.map(lambda a: a[chunk * slots : (chunk + 1) * slots], experts)
    with jax.named_scope("dispatch"):
        row = _rows_of_pairs(cell, place - wave * cells.rows, chunk, cells, local)
        pair = _invert(row, local.ep_size * cells.rows)
        leaving = _pick(share, lax.div(pair, jnp.int32(weights.shape[1])))
        leaving = weigh_inputs(leaving, weights, pair, local)
        arrived = gather_share(_swap(leaving, local), experts.gate_up.shape[1], local)
    with jax.named_scope("experts"):
        order, sizes = grouped_rows(cells.layout(received[:, chunk], wave), cells.rows)
        outputs = grouped_mlp(_pick(arrived, order), mine, sizes, local.activation)
        outputs = scatter_share(outputs, local)
    with jax.named_scope("combine"):
        back = _swap(_pick(outputs, _invert(order, order.size)), local)
        return combine(_pick(back, row).reshape(*weights.shape, -1), weights, local)


def _rows_of_pairs(
    cell: Int[Array, " TK"], row: Int[Array, " TK"], chunk: int, cells: Cells, local: Local
) -> Int[Array, " TK"]:
    """Each pair's row in the send buffer; past its end for pairs of other slices and waves, dropped, unrouted."""
    chunks = jnp.int32(local.chunks)
    here = (lax.rem(cell, chunks) == chunk) & (row >= 0) & (row < cells.rows)
    return jnp.where(here, lax.div(cell, chunks) * cells.rows + row, jnp.int32(local.ep_size * cells.rows))


def _pick(rows: Float[Array, "M d"], index: Int[Array, " N"]) -> Float[Array, "N d"]:
    """The rows at `index`; zeros where it is past the end."""
    return rows.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _invert(positions: Int[Array, " n"], size: int) -> Int[Array, " size"]:
    """`inverse[positions[i]] = i`; where nothing points, an index past any end, for which `_pick` gives zeros."""
    nothing = varying(
        jnp.full(size, jnp.iinfo(jnp.int32).max, jnp.int32), sorted(jax.typeof(positions).manual_axis_type.varying)
    )
    return nothing.at[positions].set(
        jnp.arange(positions.size, dtype=jnp.int32), mode="drop", wrap_negative_indices=False
    )


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


def _swap(buffer: Float[Array, "PC d"], local: Local) -> Float[Array, "PC d"]:
    """The payload exchange: cell p of this device becomes cell `ep_index` of device p."""
    return lax.all_to_all(buffer, local.ep, 0, 0, tiled=True) if local.ep else buffer
