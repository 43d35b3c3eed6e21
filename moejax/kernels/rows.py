"""Reading and writing some rows of a large array. XLA:CPU (of jax 0.10) widens a 16-bit array whole to do so."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels import native
from moejax.kernels.device import choose
from moejax.sharding import alike, varying_as


def take_rows(x: Float[Array, "M *D"], index: Int[Array, "*T"]) -> Float[Array, "*TD"]:
    """`x[index]` along the first axis, zeros where that has no such row; the gradient is summed in f32."""
    rows = _take(x.shape[0], *alike(x, index.reshape(-1)))
    return rows.reshape(*index.shape, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(count: int, x: jax.Array, index: jax.Array) -> jax.Array:
    def anywhere(x: jax.Array, index: jax.Array) -> jax.Array:
        return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    return choose(x, index, kernels={"cpu": native.take}, default=anywhere)


def _forward(count: int, x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(count, x, index), index


def _backward(count: int, index: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    nothing = varying_as(jnp.zeros((count, *dy.shape[1:]), jnp.float32), dy)
    total = nothing.at[index].add(dy.astype(jnp.float32), mode="drop", wrap_negative_indices=False)
    return total.astype(dy.dtype), None


_take.defvjp(_forward, _backward)


def put_rows(places: Float[Array, "B G C H"], rows: Float[Array, "B S G H"], index: Int[Array, "B S"]) -> jax.Array:
    """`places` with each row of the batch's `rows` at their index, those left out whose index is outside of C.

    Written in place where `places` is not used again. Not differentiable.
    """

    def anywhere(places: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
        batch = jnp.arange(places.shape[0], dtype=jnp.int32)[:, None]
        return places.at[batch, :, index].set(rows, mode="drop", wrap_negative_indices=False)

    return choose(*alike(places, rows, index), kernels={"cpu": native.put}, default=anywhere)
