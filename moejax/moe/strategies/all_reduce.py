"""Strategy `all_reduce`: every device sees every token, computes its own experts, and one all-reduce adds the parts up.

Made for few tokens (decode), where the latency of one collective is all that counts: the sum over experts, the sum over
the cut hidden width and the shared expert's part travel together.

Bytes: ep_bytes = T D w, over both axes in one all-reduce, where w is the width of x's dtype; tp_bytes = 0 (with one
device along `ep`, the same T D w count as tp_bytes). T is this device's tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moejax.kernels.block import Block
from moejax.kernels.rows import take_rows
from moejax.moe.dispatch import make_plan
from moejax.moe.experts import grouped_mlp, shared_expert
from moejax.moe.params import ExpertParams
from moejax.moe.router import NOWHERE, Routing
from moejax.moe.strategies.local import Accounting, Local
from moejax.moe.strategies.weighing import combine, weigh_inputs
from moejax.sharding import psum


def all_reduce(
    x: Float[Array, "T D"], routing: Routing, params: ExpertParams, local: Local
) -> tuple[Float[Array, "T D"], Accounting]:
    """The mixture of experts for tokens that every device of the expert axis holds."""
    with jax.named_scope("dispatch"):
        here = routing.experts - local.ep_index() * local.placement.slots_per_device
        mine = (here >= 0) & (here < local.placement.slots_per_device) & (routing.experts != NOWHERE)
        plan = make_plan(
            Routing(weights=routing.weights, experts=jnp.where(mine, here, jnp.int32(NOWHERE))),
            local.placement.slots_per_device,
        )
        rows = take_rows(x, lax.div(plan.order, jnp.int32(routing.experts.shape[1])))
        rows = weigh_inputs(rows, plan.weights, plan.order, local)
    with jax.named_scope("experts"):
        outputs = grouped_mlp(rows, local.routed(params), plan.counts, local.activation)
    with jax.named_scope("combine"):
        pairs = take_rows(outputs, plan.sorted_position()).reshape(*routing.experts.shape, -1)
        y = combine(pairs, plan.weights, local)
        if params.shared_gate_up is not None:
            y = y + _shared_part(x, params, local)
        axes = local.ep_axes + local.tp_axes
        total = psum(y, axes)
    return total, _account(routing, x, local)


def _shared_part(x: jax.Array, params: ExpertParams, local: Local) -> jax.Array:
    """This device's part of the shared expert, to be summed over both axes.

    The weights are whole along `ep`, so each device there takes its block of the hidden width; where that does not
    divide, the first one takes all.
    """
    gate_up, down, bias = params.shared_gate_up, params.shared_down, params.shared_gate_up_bias
    assert gate_up is not None and down is not None
    block, rest = divmod(down.shape[0], local.ep_size)
    if not rest and local.ep:
        mine = lax.axis_index(local.ep)
        gate_up, down = Block(gate_up, mine, 2, local.ep_size), Block(down, mine, 0, local.ep_size)
        bias = None if bias is None else lax.dynamic_slice_in_dim(bias, mine * block, block, 1)
    down_bias = local.on_first(params.shared_down_bias, local.ep_axes + local.tp_axes)
    y = shared_expert(x, gate_up, down, params.shared_gate, local.activation, bias, down_bias)
    return y if not rest else jnp.where(local.ep_index() == 0, y, jnp.zeros((), y.dtype))


def _account(routing: Routing, x: jax.Array, local: Local) -> Accounting:
    tokens = make_plan(routing, local.placement.num_experts).counts
    sent = jnp.float32(x.size * x.dtype.itemsize)
    return Accounting(
        tokens_per_expert=psum(tokens, local.others),
        dropped=jnp.int32(0),
        waves=jnp.int32(1),
        ep_bytes=sent if local.ep else jnp.float32(0),
        tp_bytes=sent if local.tp and not local.ep else jnp.float32(0),
    )
