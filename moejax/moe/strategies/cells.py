"""The layout of exchange cells: which row of which cell holds which pair.

A *cell* is what one sender sends to one receiving device in one wave: a fixed number of rows, sorted by the receiver's
experts. Both ends derive the same layout from the same counts, so no index ever travels.

- Exact cells have `capacity` rows for the pair (sender, device). Pairs that do not fit go in the next wave.
- GShard's cells have `per_expert` rows for each expert of the device, in one wave. Pairs that do not fit are dropped.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from moejax.moe.dispatch import DispatchPlan

NO_PLACE = 1 << 30
"""Past the last row of any exchange, and far enough below 2^31 to subtract from."""


class Layout(NamedTuple):
    """For each cell and each expert of its device, the rows of one wave: the first one in the cell, and how many."""

    first: Int[Array, "P L"]
    size: Int[Array, "P L"]


@dataclass(frozen=True, slots=True)
class Cells:
    """The form of an exchange's cells: `rows` each, exact, or `per_expert` rows for each of the device's experts."""

    rows: int
    per_expert: int | None = None

    def starts(self, counts: Int[Array, "P L"]) -> Int[Array, "P L"]:
        """The place of each expert's first pair in its cell, waves put end to end."""
        if self.per_expert is not None:
            return jnp.broadcast_to(jnp.arange(counts.shape[1], dtype=jnp.int32) * self.per_expert, counts.shape)
        return jnp.cumsum(counts, axis=1) - counts

    def layout(self, counts: Int[Array, "P L"], wave: Int[Array, ""]) -> Layout:
        """Where the rows of each expert lie in each cell, given how many pairs the cell's sender has for it."""
        kept = counts if self.per_expert is None else jnp.minimum(counts, self.per_expert)
        begin = self.starts(counts) - wave * self.rows
        first, end = (jnp.clip(edge, 0, self.rows) for edge in (begin, begin + kept))
        return Layout(first, end - first)

    def places(self, plan: DispatchPlan, num_cells: int) -> tuple[Int[Array, " TK"], Int[Array, " TK"]]:
        """Each pair's cell, of `num_cells` equal parts of the slots, and its place there, waves put end to end.

        A pair that is dropped or goes nowhere has a place past any wave.
        """
        per_cell = plan.num_experts // num_cells
        slot = jnp.minimum(plan.expert, plan.num_experts - 1)
        room = jnp.iinfo(jnp.int32).max if self.per_expert is None else self.per_expert
        going = (plan.expert < plan.num_experts) & (plan.rank < room)
        place = self.starts(plan.counts.reshape(num_cells, per_cell)).reshape(-1)[slot] + plan.rank
        return lax.div(slot, jnp.int32(per_cell)), jnp.where(going, place, NO_PLACE)

    def waves(self, counts: Int[Array, "*cells L"]) -> Int[Array, ""]:
        """How many waves bring every pair over: that of the fullest cell, at least 1."""
        if self.per_expert is not None:
            return jnp.int32(1)
        return jnp.maximum(lax.div(counts.sum(-1).max() + (self.rows - 1), jnp.int32(self.rows)), 1)

    def dropped(self, counts: Int[Array, "*cells L"]) -> Int[Array, ""]:
        """Pairs that find no room."""
        if self.per_expert is None:
            return jnp.int32(0)
        return jnp.maximum(counts - self.per_expert, 0).sum()


def grouped_rows(layout: Layout, rows: int) -> tuple[Int[Array, " PC"], Int[Array, " L"]]:
    """The order that sorts received rows by expert (then by sender), and how many each expert has.

    Returns:
      source: for each place in sorted order the row among the P * rows received; P * rows past the last one.
      group_sizes: rows for each expert.
    """
    senders = layout.size.shape[0]
    sizes = layout.size.T.reshape(-1)
    ends = jnp.cumsum(sizes)
    first = (layout.first + jnp.arange(senders, dtype=jnp.int32)[:, None] * rows).T.reshape(-1)
    place = jnp.arange(senders * rows, dtype=jnp.int32)
    source = place + jnp.repeat(first - (ends - sizes), sizes, total_repeat_length=place.size)
    return jnp.where(place < ends[-1], source, jnp.int32(senders * rows)), layout.size.sum(0)
