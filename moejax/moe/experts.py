"""The computation inside experts: gated MLPs over rows sorted by expert, and the shared expert over all rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import Activation
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.moe.params import activate
from moejax.precision import precision_of


def grouped_mlp(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    group_sizes: Int[Array, " E"],
    activation: Activation,
) -> Float[Array, "M D"]:
    """`down_e(activation(gate_e x) * up_e x)` for rows sorted by expert; zeros past the last group.

    With F cut over the tensor axis the result is this device's partial sum.
    """
    experts, width, _, hidden = gate_up.shape
    both = grouped_matmul(rows, gate_up.reshape(experts, width, 2 * hidden), group_sizes)
    inner = activate(both[:, :hidden], activation) * both[:, hidden:]
    return grouped_matmul(inner, down, group_sizes)


def gated_mlp(
    x: Float[Array, "*T D"], gate_up: Float[Array, "D 2 F"], down: Float[Array, "F D"], activation: Activation
) -> Float[Array, "*T D"]:
    """One gated MLP over all rows: a dense layer, or a shared expert without its gate."""
    precision = precision_of(x.dtype)
    both = jnp.einsum("...d,dcf->...cf", x, gate_up, precision=precision)
    return jnp.einsum(
        "...f,fd->...d", activate(both[..., 0, :], activation) * both[..., 1, :], down, precision=precision
    )


def shared_expert(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "D 2 F"],
    down: Float[Array, "F D"],
    gate: Float[Array, " D"] | None,
    activation: Activation,
) -> Float[Array, "T D"]:
    """The expert that every token visits, times `sigmoid(x . gate)` where it has a gate (Qwen2-MoE)."""
    y = gated_mlp(x, gate_up, down, activation)
    if gate is None:
        return y
    openness = jax.nn.sigmoid(
        jnp.einsum("td,d->t", x, gate, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    )
    return y * openness[:, None].astype(y.dtype)
