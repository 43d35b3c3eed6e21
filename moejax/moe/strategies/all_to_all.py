"""Strategy `all_to_all`: tokens are cut over the expert axis, and each chosen (token, expert) pair travels to its
expert and back.

**Exact without a big buffer.** A cell (sender, receiving device) has a fixed capacity near the even share. Counts go
round first (one all-gather of int32), so all devices know the fullest cell; when it overflows they repeat the same
exchange until every pair has been over. Nothing is dropped unless the caller gives a `capacity_factor`.

**On the wire.** Each device of the tensor axis carries its share of D over the expert axis and the receivers put the
shares together over the tensor axis; where that axis does not divide D, whole rows travel instead.

Bytes of collective operands on each device, with P devices along ep, R along tp, w bytes an element, T tokens a device,
cells of C rows, n chunks (C is then a slice's), S slots, d = D / R and r = R (shares) or d = D and r = 1 (whole rows):

    ep_bytes = waves * 2 n P C d w + 4 S
    tp_bytes = waves * n P C (D / R + D) w + T (D / R + s D) w     shares: gather, scatter, last gather
             = T D w                                             whole rows: one all-reduce

where s is 1 with a shared expert, whose partial sums are scattered too, and 0 without.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch import DispatchPlan, make_plan
from moejax.moe.experts import shared_expert
from moejax.moe.params import ExpertParams
from moejax.moe.router import Routing
from moejax.moe.strategies.cells import Cells
from moejax.moe.strategies.exchange import by_slice, exchange
from moejax.moe.strategies.local import Accounting, Local
from moejax.moe.strategies.shares import cut_share, divides, scatter_share, whole
from moejax.sharding import came, pmax, psum

HEADROOM = 1.5
"""Cell capacity over the even share. Measured on real routing: larger sends padding, smaller needs second waves."""


def all_to_all(
    x: Float[Array, "T D"], routing: Routing, params: ExpertParams, local: Local
) -> tuple[Float[Array, "T D"], Accounting]:
    """The mixture of experts for this device's own tokens."""
    cells = make_cells(x.shape[0], routing.experts.shape[1], local)
    with jax.named_scope("dispatch"):
        plan = make_plan(routing, local.placement.slots)
        counts = came(lax.all_gather(plan.counts, local.ep, to="invarying")) if local.ep else plan.counts[None]
        waves = cells.waves(by_slice(counts, local))
        share = cut_share(x, local)
    y = exchange(share, plan, counts, waves, params, cells, local)
    if params.shared_gate_up is not None and params.shared_down is not None:
        with jax.named_scope("experts"):
            part = shared_expert(
                x,
                params.shared_gate_up,
                params.shared_down,
                params.shared_gate,
                local.activation,
                params.shared_gate_up_bias,
                local.on_first(params.shared_down_bias, local.tp_axes),
            )
            y = y + scatter_share(part, local)
    with jax.named_scope("combine"):
        y = whole(y, x.shape[1], local)
    return y, _account(x, plan, counts, waves, cells, params, local)


def make_cells(tokens: int, chosen: int, local: Local) -> Cells:
    """The form of the cells for `tokens` tokens a device with `chosen` experts each.

    Exact: capacity ceil(1.5 T K / (P chunks)). With a `capacity_factor` f: GShard's ceil(f T K / E) rows for each
    expert. Never more than the T K pairs that there are.
    """
    pairs = tokens * chosen
    if local.capacity_factor is not None:
        slots = local.placement.slots_per_device // local.chunks
        per_expert = max(1, min(pairs, math.ceil(local.capacity_factor * pairs / local.placement.num_experts)))
        return Cells(rows=slots * per_expert, per_expert=per_expert)
    return Cells(rows=max(1, min(pairs, math.ceil(HEADROOM * pairs / (local.ep_size * local.chunks)))))


def _account(
    x: Float[Array, "T D"],
    plan: DispatchPlan,
    counts: Int[Array, "P S"],
    waves: Int[Array, ""],
    cells: Cells,
    params: ExpertParams,
    local: Local,
) -> Accounting:
    tokens, width = x.shape
    item, shared = x.dtype.itemsize, params.shared_gate_up is not None
    in_flight = local.chunks * local.ep_size * cells.rows * item
    waves = pmax(waves, local.others)  # of the busiest data-parallel group
    repeats = waves.astype(jnp.float32)
    if divides(width, local):
        share = width // local.tp_size
        tp_bytes = repeats * (in_flight * (share + width)) + tokens * (share + width * shared) * item
    else:
        share = width
        tp_bytes = jnp.float32(tokens * width * item if local.tp else 0)
    ep_bytes = repeats * (2 * in_flight * share) + 4 * plan.counts.size
    return Accounting(
        tokens_per_expert=psum(counts.sum(0), local.others)[: local.placement.num_experts],
        dropped=psum(cells.dropped(counts), local.others),
        waves=waves,
        ep_bytes=ep_bytes if local.ep else jnp.float32(0),
        tp_bytes=tp_bytes,
    )
