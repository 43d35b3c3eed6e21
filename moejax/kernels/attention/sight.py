"""Which keys each query sees, as a few small vectors instead of a table of S x T truths.

A query sees the keys of its own segment whose places lie from its `first` to its `last`. Causal attention, windows,
chunks, padding, half-filled caches and rings are all of this form.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NOWHERE = jnp.iinfo(jnp.int32).max
"""A place after all others: the first that a query of no token sees."""


class Queries(NamedTuple):
    """The places that each query sees, both ends included, and its segment (None: all are of one)."""

    first: Int[Array, "B S"]
    last: Int[Array, "B S"]
    segments: Int[Array, "B S"] | None


class Keys(NamedTuple):
    """The place of each key, -1 where there is none, and its segment (None: all are of one)."""

    places: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


def queries_at(
    places: Int[Array, "B S"], segments: Int[Array, "B S"] | None, window: int | None, chunk: int | None
) -> Queries:
    """Queries at `places`, -1 for those of no token.

    Args:
      places, segments: of each query.
      window: the most places seen, the query's own among them; None for all.
      chunk: queries see only places of their own chunk of this many; None for no chunks.
    """
    first = jnp.zeros_like(places)
    if window is not None:
        first = jnp.maximum(first, places - (window - 1))
    if chunk is not None:
        first = jnp.maximum(first, places // chunk * chunk)
    return Queries(jnp.where(places < 0, NOWHERE, first), places, segments)


def visible(queries: Queries, keys: Keys) -> Bool[Array, "B S T"]:
    """Which keys each query sees."""
    places = keys.places[:, None]
    seen = (queries.first[:, :, None] <= places) & (places <= queries.last[:, :, None])
    if queries.segments is None or keys.segments is None:
        return seen
    return seen & (queries.segments[:, :, None] == keys.segments[:, None])
