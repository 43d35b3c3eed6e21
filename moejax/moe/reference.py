"""The oracle: a mixture of experts written the slow, obvious way, on one device, without a mesh.

Every strategy on every mesh is tested against this.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import Activation
from moejax.moe.experts import gated_mlp, shared_expert
from moejax.moe.params import ExpertParams
from moejax.moe.router import Routing


def dense_moe(
    x: Float[Array, "T D"],
    params: ExpertParams,
    routing: Routing,
    activation: Activation = "silu",
    scales_input: bool = False,
) -> Float[Array, "T D"]:
    """Runs every expert on every token and sums with the routing weights, 0 where an expert was not chosen.

    With `scales_input` the weights multiply what goes into an expert instead, and what comes out is added as it is.
    """
    y = jnp.zeros(x.shape, jnp.float32)
    for expert in range(params.gate_up.shape[0]):
        biases = (None if b is None else b[expert] for b in (params.gate_up_bias, params.down_bias))
        weights = (params.gate_up[expert], params.down[expert], activation, *biases)
        chosen = routing.experts == expert
        if scales_input:
            scaled = x[:, None].astype(jnp.float32) * routing.weights[..., None]
            outputs = gated_mlp(scaled.astype(x.dtype), *weights).astype(jnp.float32)
            y = y + jnp.where(chosen[..., None], outputs, 0.0).sum(1)
        else:
            weight = jnp.where(chosen, routing.weights, 0.0).sum(-1)
            y = y + weight[:, None] * gated_mlp(x, *weights).astype(jnp.float32)
    y = y.astype(x.dtype)
    if params.shared_gate_up is None or params.shared_down is None:
        return y
    biases = (params.shared_gate_up_bias, params.shared_down_bias)
    return y + shared_expert(x, params.shared_gate_up, params.shared_down, params.shared_gate, activation, *biases)
