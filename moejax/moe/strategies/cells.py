"""The layout of exchange cells: which row of which cell holds which pair.

A *cell* is what one sender sends to one receiving device in one wave: a fixed number of rows, sorted by the receiver's experts. Both
ends derive the same layout from the same counts, so no index ever travels.

- Exact cells have `capacity` rows for the pair (sender, device). Pairs that do not fit go in the next wave.
- GShard's cells have `per_expert` rows for each expert of the device, in one wave. Pairs that do not fit are dropped.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Layout(NamedTuple):
    """For each cell and each expert of its device, the rows of one wave.

    Attributes:
      first: the first row in the cell.
      size: how many rows.
      skipped: how many rows of that expert went in earlier waves.
    """

    first: Int[Array, "P L"]
    size: Int[Array, "P L"]
    skipped: Int[Array, "P L"]


@dataclass(frozen=True, slots=True)
class Cells:
    """The form of all cells of one exchange: `rows` each, exact or `per_expert` rows for each of the device's experts."""

    rows: int
    per_expert: int | None = None

    def layout(self, counts: Int[Array, "P L"], wave: Int[Array, ""] | int) -> Layout:
        """Where the rows of each expert lie in each cell, given how many pairs the cell's sender has for it."""
        if self.per_expert is not None:
            experts = jnp.arange(counts.shape[1], dtype=jnp.int32)
            first = jnp.broadcast_to(experts * self.per_expert, counts.shape)
            return Layout(first, jnp.minimum(counts, self.per_expert), jnp.zeros_like(counts))
        starts = jnp.cumsum(counts, axis=1) - counts - wave * self.rows
        first, end = (jnp.clip(edge, 0, self.rows) for edge in (starts, starts + counts))
        return Layout(first, end - first, jnp.clip(-starts, 0, counts))

    def waves(self, counts: Int[Array, "*cells L"]) -> Int[Array, ""]:
        """How many waves bring every pair over: that of the fullest cell, at least 1."""
        if self.per_expert is not None:
            return jnp.int32(1)
        return jnp.maximum(-(-counts.sum(-1).max() // self.rows), 1)

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
    place = jnp.arange(senders * rows, dtype=jnp.int32)
    segment = jnp.repeat(jnp.arange(sizes.size, dtype=jnp.int32), sizes, total_repeat_length=place.size)
    expert, sender = segment // senders, segment % senders
    source = sender * rows + layout.first[sender, expert] + place - (ends - sizes)[segment]
    return jnp.where(place < ends[-1], source, jnp.int32(senders * rows)), layout.size.sum(0)
