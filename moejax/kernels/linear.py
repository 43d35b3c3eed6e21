"""Linear layers: the case of one group. XLA:CPU reads bf16 weights at a twentieth of the memory's bandwidth in decode,
so that dense layers need the kernel of the experts no less than these do."""

import math
from functools import partial

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.kernels import platforms
from moejax.sharding import varying_as


def linear(
    x: Float[Array, "*T"],
    w: Float[Array, "*N"],
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
    matrix = w.reshape((math.prod(outputs), width) if transposed else (width, math.prod(outputs)))
    flat = x.reshape(math.prod(rows), width)
    # Marked alike before the custom gradient, as in grouped_matmul.
    y = _linear(varying_as(flat, matrix), varying_as(matrix, flat), transposed, out_dtype or x.dtype)
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
