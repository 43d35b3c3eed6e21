"""The computation inside experts: gated MLPs over rows sorted by expert, and the shared expert over all rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import Activation
from moejax.kernels.block import Block
from moejax.kernels.gated_matmul import silu_gated_matmul
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.linear import linear
from moejax.moe.activations import activate
from moejax.moe.params import ExpertParams
from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix


def grouped_mlp(
    rows: Float[Array, "M D"], params: ExpertParams, group_sizes: Int[Array, " E"], activation: Activation
) -> Float[Array, "M D"]:
    """`down_e activation(gate_e x, up_e x)`, with biases where there are, for rows sorted by expert; zeros past the
    last group.

    With F cut over the tensor axis the result is this device's partial sum, into which the whole of `down_bias` goes.
    """
    return grouped_down(grouped_gate_up(rows, params, group_sizes, activation), params, group_sizes)


def grouped_gate_up(
    rows: Float[Array, "M D"],
    params: ExpertParams,
    group_sizes: Int[Array, " n"],
    activation: Activation,
    first: int = 0,
) -> Float[Array, "M F"]:
    """The first half of `grouped_mlp`, for the rows of the n experts from `first` on."""
    experts, width, _, hidden = params.gate_up.shape
    plain = params.gate_up_bias is None and activation == "silu" and group_sizes.size == experts
    if plain and not isinstance(params.gate_up, PackedMatrix):
        return silu_gated_matmul(rows, params.gate_up, group_sizes)
    both = grouped_matmul(rows, params.gate_up.reshape(experts, width, 2 * hidden), group_sizes, first)
    if params.gate_up_bias is not None:
        bias = params.gate_up_bias.reshape(experts, 2 * hidden)[first : first + group_sizes.size]
        both = both + _of_each_row(bias, group_sizes, rows.shape[0])
    return activate(both[:, :hidden], both[:, hidden:], activation)


def grouped_down(
    inner: Float[Array, "M F"], params: ExpertParams, group_sizes: Int[Array, " n"], first: int = 0
) -> Float[Array, "M D"]:
    """The second half of `grouped_mlp`."""
    outputs = grouped_matmul(inner, params.down, group_sizes, first)
    if params.down_bias is not None:
        bias = params.down_bias[first : first + group_sizes.size]
        outputs = outputs + _of_each_row(bias, group_sizes, inner.shape[0])
    return outputs


def _of_each_row(values: Float[Array, "E n"], group_sizes: Int[Array, " E"], rows: int) -> Float[Array, "M n"]:
    """The entry of each row's expert; zeros past the last group."""
    sizes = jnp.append(group_sizes, rows - group_sizes.sum())  # the rest is a last group, of no expert
    expert = jnp.repeat(jnp.arange(sizes.size, dtype=jnp.int32), sizes, total_repeat_length=rows)
    return values.at[expert].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def gated_mlp(
    x: Float[Array, "*T D"],
    gate_up: Float[Array, "D 2 F"] | Block,
    down: Float[Array, "F D"] | Block,
    activation: Activation,
    gate_up_bias: Float[Array, "2 F"] | None = None,
    down_bias: Float[Array, " D"] | None = None,
) -> Float[Array, "*T D"]:
    """One gated MLP over all rows: a dense layer, or a shared expert without its gate."""
    both = linear(x, gate_up)
    both = both if gate_up_bias is None else both + gate_up_bias
    inner = activate(both[..., 0, :], both[..., 1, :], activation)
    y = linear(inner, down)
    return y if down_bias is None else y + down_bias


def shared_expert(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "D 2 F"] | Block,
    down: Float[Array, "F D"] | Block,
    gate: Float[Array, " D"] | None,
    activation: Activation,
    gate_up_bias: Float[Array, "2 F"] | None = None,
    down_bias: Float[Array, " D"] | None = None,
) -> Float[Array, "T D"]:
    """The expert that every token visits, times `sigmoid(x . gate)` where it has a gate (Qwen2-MoE)."""
    y = gated_mlp(x, gate_up, down, activation, gate_up_bias, down_bias)
    if gate is None:
        return y
    openness = jax.nn.sigmoid(
        jnp.einsum("td,d->t", x, gate, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    )
    return y * openness[:, None].astype(y.dtype)
