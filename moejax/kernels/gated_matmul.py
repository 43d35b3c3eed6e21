"""Gate and up projection with the activation between them, in one kernel where there is one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels import native
from moejax.kernels.device import choose
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.sharding import alike


def silu_gated_matmul(
    x: Float[Array, "M D"], gate_up: Float[Array, "G D 2 F"], group_sizes: Int[Array, " G"]
) -> Float[Array, "M F"]:
    """`silu(x[i] @ gate_g) * (x[i] @ up_g)` for each row i of group g; rows past the last group give zeros.

    Args:
      x: rows sorted by group.
      gate_up: of x's dtype.
      group_sizes: rows of each group, int32.

    Returns:
      In x's dtype. Differentiable in `x` and `gate_up`; the gradient needs both products, which are then kept.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, gate_up.shape[3]), x.dtype)
    return _gated(*alike(x, gate_up, group_sizes))


@jax.custom_vjp
def _gated(x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> jax.Array:
    def on_cpu(x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return native.gated_products(x, gate_up.reshape(*gate_up.shape[:2], -1), group_sizes)

    return choose(x, gate_up, group_sizes, kernels={"cpu": on_cpu}, default=_plain)


def _plain(x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> jax.Array:
    groups, width = gate_up.shape[:2]
    both = grouped_matmul(x, gate_up.reshape(groups, width, -1), group_sizes)
    return jax.checkpoint(_hidden)(both)  # kept for the gradient: both products, and none of the steps between them


def _hidden(both: jax.Array) -> jax.Array:
    gate, up = jnp.split(both, 2, 1)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(both.dtype) * up


def _forward(x: jax.Array, gate_up: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, Callable]:
    return jax.vjp(lambda x, gate_up: _plain(x, gate_up, group_sizes), x, gate_up)


def _backward(pullback: Callable, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return *pullback(dy), None


_gated.defvjp(_forward, _backward)
