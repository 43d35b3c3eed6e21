"""One slice of a device's experts in one wave of the exchange: the stages of its way."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.kernels.rows import take_rows
from moejax.moe.experts import grouped_down, grouped_gate_up
from moejax.moe.params import ExpertParams
from moejax.moe.strategies.cells import Cells, grouped_rows
from moejax.moe.strategies.local import Local
from moejax.moe.strategies.shares import scatter_share
from moejax.moe.strategies.weighing import combine, weigh_inputs
from moejax.sharding import came, varying


class Slice:
    """In this order: `send`, `swap` over the expert axis, `gate_up`, `down`, `reply`, `swap` again, `combine`.

    Rows are shares of D on the wire, and whole for the experts.
    """

    def __init__(
        self,
        chunk: int,
        weights: Float[Array, "T K"],
        indices: tuple[jax.Array, ...],
        wave: jax.Array,
        cells: Cells,
        local: Local,
    ):
        cell, place, received = indices
        self.weights, self.local = weights, local
        self.first = chunk * (local.placement.slots_per_device // local.chunks)
        with jax.named_scope("dispatch"):
            self.row = _rows_of_pairs(cell, place - wave * cells.rows, chunk, cells, local)
            self.pair = _invert(self.row, local.ep_size * cells.rows)
        with jax.named_scope("experts"):
            self.order, self.sizes = grouped_rows(cells.layout(received[:, chunk], wave), cells.rows)

    def send(self, share: Float[Array, "T d"]) -> Float[Array, "PC d"]:
        """This device's rows for the slice's experts of each device."""
        with jax.named_scope("dispatch"):
            leaving = _pick(share, lax.div(self.pair, jnp.int32(self.weights.shape[1])))
            return weigh_inputs(leaving, self.weights, self.pair, self.local)

    def gate_up(self, rows: Float[Array, "PC D"], experts: ExpertParams) -> Float[Array, "PC F"]:
        """The experts' hidden values, sorted by expert."""
        with jax.named_scope("experts"):
            return grouped_gate_up(_pick(rows, self.order), experts, self.sizes, self.local.activation, self.first)

    def down(self, inner: Float[Array, "PC F"], experts: ExpertParams) -> Float[Array, "PC D"]:
        """The experts' outputs, sorted by expert: partial sums over the tensor axis."""
        with jax.named_scope("experts"):
            return grouped_down(inner, experts, self.sizes, self.first)

    def reply(self, outputs: Float[Array, "PC D"]) -> Float[Array, "PC d"]:
        """What goes back, in the order in which the rows arrived."""
        with jax.named_scope("combine"):
            return _pick(scatter_share(outputs, self.local), _invert(self.order, self.order.size))

    def combine(self, back: Float[Array, "PC d"]) -> Float[Array, "T d"]:
        """The sum over the slice's experts of each token, of the rows that came back."""
        with jax.named_scope("combine"):
            return combine(_pick(back, self.row).reshape(*self.weights.shape, -1), self.weights, self.local)


def _rows_of_pairs(
    cell: Int[Array, " TK"], row: Int[Array, " TK"], chunk: int, cells: Cells, local: Local
) -> Int[Array, " TK"]:
    """Each pair's row in the send buffer; past its end for pairs of other slices and waves, dropped, unrouted."""
    chunks = jnp.int32(local.chunks)
    here = (lax.rem(cell, chunks) == chunk) & (row >= 0) & (row < cells.rows)
    return jnp.where(here, lax.div(cell, chunks) * cells.rows + row, jnp.int32(local.ep_size * cells.rows))


def _pick(rows: Float[Array, "M d"], index: Int[Array, " N"]) -> Float[Array, "N d"]:
    """The rows at `index`; zeros where it is past the end."""
    return take_rows(rows, index)


def _invert(positions: Int[Array, " n"], size: int) -> Int[Array, " size"]:
    """`inverse[positions[i]] = i`; where nothing points, an index past any end, for which `_pick` gives zeros."""
    nothing = varying(
        jnp.full(size, jnp.iinfo(jnp.int32).max, jnp.int32), sorted(jax.typeof(positions).manual_axis_type.varying)
    )
    return nothing.at[positions].set(
        jnp.arange(positions.size, dtype=jnp.int32), mode="drop", wrap_negative_indices=False
    )


def swap(buffer: Float[Array, "PC d"], local: Local) -> Float[Array, "PC d"]:
    """The payload exchange: cell p of this device becomes cell `ep_index` of device p."""
    with jax.named_scope("exchange"):
        return came(lax.all_to_all(buffer, local.ep, 0, 0, tiled=True)) if local.ep else buffer
