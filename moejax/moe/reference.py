"""The oracle: a mixture of experts written the slow, obvious way, on one device, without a mesh.

Every strategy on every mesh is tested against this.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import Activation
from moejax.moe.activations import activate
from moejax.moe.params import ExpertParams
from moejax.moe.router import Routing
from moejax.precision import precision_of


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
            outputs = plain_mlp(scaled.astype(x.dtype), *weights).astype(jnp.float32)
            y = y + jnp.where(chosen[..., None], outputs, 0.0).sum(1)
        else:
            weight = jnp.where(chosen, routing.weights, 0.0).sum(-1)
            y = y + weight[:, None] * plain_mlp(x, *weights).astype(jnp.float32)
    y = y.astype(x.dtype)
    if params.shared_gate_up is None or params.shared_down is None:
        return y
    biases = (params.shared_gate_up_bias, params.shared_down_bias)
    shared = plain_mlp(x, params.shared_gate_up, params.shared_down, activation, *biases)
    if params.shared_gate is None:
        return y + shared
    exact = precision_of(x.dtype)
    gate = jnp.einsum("td,d->t", x, params.shared_gate, precision=exact, preferred_element_type=jnp.float32)
    return y + shared * jax.nn.sigmoid(gate)[:, None].astype(y.dtype)


def plain_mlp(
    x: Float[Array, "*T D"],
    gate_up: Float[Array, "D 2 F"],
    down: Float[Array, "F D"],
    activation: Activation,
    gate_up_bias: Float[Array, "2 F"] | None = None,
    down_bias: Float[Array, " D"] | None = None,
) -> Float[Array, "*T D"]:
    """One gated MLP over all rows, by XLA's own products."""
    precision = precision_of(x.dtype)
    both = jnp.einsum("...d,dcf->...cf", x, gate_up, precision=precision)
    both = both if gate_up_bias is None else both + gate_up_bias
    inner = activate(both[..., 0, :], both[..., 1, :], activation)
    y = jnp.einsum("...f,fd->...d", inner, down, precision=precision)
    return y if down_bias is None else y + down_bias
