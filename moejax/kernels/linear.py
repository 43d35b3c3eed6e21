"""Linear layers: the case of one group. XLA:CPU reads bf16 weights at a twentieth of the memory's bandwidth in decode,
so that dense layers need the kernel of the experts no less than these do."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.kernels import platforms
from moejax.kernels.block import Block
from moejax.sharding import alike


def linear(
    x: Float[Array, "*T"],
    w: Float[Array, "*N"] | Block,
    *,
    axes: int = 1,
    transposed: bool = False,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*TN"]:
    """`x [*T, *K]` times `w [*K, *N]`, summed over K in f32: `[*T, *N]`.

    Args:
      x: rows.
      w: of x's dtype; with `transposed`, `[N, *K]`.
      axes: how many axes K has.
      transposed: multiply by the transpose of `w`.
      out_dtype: of the result; None is x's.

    Returns:
      The products. Differentiable in `x` and `w`.
    """
    rows, width = x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :])
    outputs = w.shape[: w.ndim - axes] if transposed else w.shape[axes:]
    out_dtype = out_dtype or x.dtype
    flat = x.reshape(math.prod(rows), width)
    if isinstance(w, Block):
        y = _of_block(flat, w, axes, transposed, out_dtype)
    else:
        matrix = w.reshape((math.prod(outputs), width) if transposed else (width, math.prod(outputs)))
        y = _linear(*alike(flat, matrix), transposed, out_dtype)
    return y.reshape(*rows, *outputs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x: jax.Array, w: jax.Array, transposed: bool, out_dtype: DTypeLike) -> jax.Array:
    return platforms.product(x, w, transposed=transposed, out_dtype=out_dtype)


def _forward(x: jax.Array, w: jax.Array, transposed: bool, out_dtype: DTypeLike) -> tuple[jax.Array, tuple]:
    return _linear(x, w, transposed, out_dtype), (x, w)


def _backward(transposed: bool, out_dtype: DTypeLike, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dy = dy.astype(x.dtype)
    dx = platforms.product(dy, w, transposed=not transposed, out_dtype=x.dtype)
    return dx, platforms.product_gradient(dy, x) if transposed else platforms.product_gradient(x, dy)


_linear.defvjp(_forward, _backward)


def _of_block(x: jax.Array, w: Block, axes: int, transposed: bool, out_dtype: DTypeLike) -> jax.Array:
    """The block as one of several groups: `whole` is looked at with the axis of its parts as a group axis."""
    whole, parts, size = w.whole, w.count, math.prod(w.whole.shape)
    if w.axis == 0:  # parts of K, or of N where it comes first
        grouped = whole.reshape(parts, -1, x.shape[1]) if transposed else whole.reshape(parts, x.shape[1], -1)
        return _grouped(x, grouped, w.index, 0, transposed, out_dtype)
    assert w.axis >= axes and not transposed, f"no product with a block along axis {w.axis} of {whole.shape}"
    before = math.prod(whole.shape[axes : w.axis])  # of the outputs, such as the two of gate and up
    grouped = whole.reshape(x.shape[1], before * parts, size // (x.shape[1] * before * parts))
    products = [_grouped(x, grouped, w.index + i * parts, 1, False, out_dtype) for i in range(before)]
    return products[0] if before == 1 else jnp.stack(products, 1)


def _grouped(
    x: jax.Array, w: jax.Array, index: jax.Array, axis: int, transposed: bool, out_dtype: DTypeLike
) -> jax.Array:
    return _block_product(*alike(x, w, index), axis, transposed, out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _block_product(
    x: jax.Array, w: jax.Array, index: jax.Array, axis: int, transposed: bool, out_dtype: DTypeLike
) -> jax.Array:
    return platforms.block_product(x, w, index, axis=axis, transposed=transposed, out_dtype=out_dtype)


def _block_forward(
    x: jax.Array, w: jax.Array, index: jax.Array, axis: int, transposed: bool, out_dtype: DTypeLike
) -> tuple[jax.Array, tuple]:
    return _block_product(x, w, index, axis, transposed, out_dtype), (x, w, index)


def _block_backward(
    axis: int, transposed: bool, out_dtype: DTypeLike, saved: tuple, dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, index = saved

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        matrix = Block(w, index, axis, w.shape[axis]).array().squeeze(axis)
        return _linear(x, matrix, transposed, out_dtype)

    return *jax.vjp(plain, x, w)[1](dy), None


_block_product.defvjp(_block_forward, _block_backward)
