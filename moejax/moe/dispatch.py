"""The dispatch plan: integer bookkeeping between a routing and the exchange of rows.

A *pair* is one (token, chosen expert); T tokens have T * K of them, numbered token by token. The plan sorts pairs by
the slot of their expert, earlier tokens first, and knows how many there are for each. That is all the fast path needs.
The dense view of GShard (one-hot tensors over token, expert, capacity) says the same thing and is made from it on
demand.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moejax.moe.router import NOWHERE, Routing


@struct.dataclass
class DispatchPlan:
    """Pairs sorted by expert.

    Attributes:
      expert: the expert (or slot) of each pair; `num_experts` for a pair that goes nowhere.
      order: the pairs as they are sorted, those that go nowhere last.
      rank: the pair's place among the pairs of its expert, in token order from 0.
      counts: pairs for each expert.
      weights: routing weight of each pair, f32.
      num_experts: E (or the number of slots).
    """

    expert: Int[Array, " TK"]
    order: Int[Array, " TK"]
    rank: Int[Array, " TK"]
    counts: Int[Array, " E"]
    weights: Float[Array, "T K"]
    num_experts: int = struct.field(pytree_node=False)

    def sorted_position(self) -> Int[Array, " TK"]:
        """Each pair's place when all pairs are sorted by expert; pairs that go nowhere come last."""
        return _inverse(self.order)

    def dispatch_TEC(self, capacity: int | None = None) -> Bool[Array, "T E C"]:
        """GShard's dispatch tensor: true where token t is row c of expert e. Pairs of rank >= capacity are dropped.

        Args:
          capacity: C, rows for each expert; T (nothing can be dropped, an expert is chosen once by a token) unless
            given.
        """
        return self._one_hot_TKEC(capacity).any(1)

    def combine_TEC(self, capacity: int | None = None) -> Float[Array, "T E C"]:
        """GShard's combine tensor: the routing weight where `dispatch_TEC` is true, else 0."""
        return jnp.einsum("tkec,tk->tec", self._one_hot_TKEC(capacity).astype(jnp.float32), self.weights)

    def dropped(self, capacity: int) -> Int[Array, ""]:
        """Pairs that do not fit when each expert takes `capacity` rows."""
        return jnp.maximum(self.counts - capacity, 0).sum()

    def _one_hot_TKEC(self, capacity: int | None) -> Bool[Array, "T K E C"]:
        tokens, chosen = self.weights.shape
        rows = tokens if capacity is None else capacity
        expert = jax.nn.one_hot(self.expert, self.num_experts, dtype=bool)[:, :, None]
        row = jax.nn.one_hot(self.rank, rows, dtype=bool)[:, None, :]
        return (expert & row).reshape(tokens, chosen, self.num_experts, rows)


def make_plan(routing: Routing, num_experts: int) -> DispatchPlan:
    """Sorts the pairs of a routing of T tokens by expert, stably, so that earlier tokens keep the lower ranks."""
    expert = routing.experts.reshape(-1)
    expert = jnp.where(expert == NOWHERE, jnp.int32(num_experts), expert)
    # Not jnp.argsort: inside shard_map JAX (0.10 to 0.12) takes its result for the same on all devices, and a gradient
    # would be computed with that of the first.
    order = lax.sort((expert, jnp.arange(expert.size, dtype=jnp.int32)), num_keys=1, is_stable=True)[1]
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    rank = _inverse(order) - (jnp.cumsum(counts) - counts)[expert]
    return DispatchPlan(expert, order, rank, counts[:-1], routing.weights, num_experts)


def _inverse(order: Int[Array, " n"]) -> Int[Array, " n"]:
    """`inverse[order[i]] = i`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
