"""Which implementation computes a product: decided by platform where a program is lowered.

| platform | groups known at run time        | one group (a linear layer) |
|----------|---------------------------------|----------------------------|
| CPU      | native kernel, else `tile_loop` | native kernel, else XLA    |
| others   | `tile_loop`                     | XLA                        |
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import tile_loop
from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "G _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` (`x[i] @ w[g].T` with `w [G, N, K]`) for each row i of group g, zeros past the last; x's dtype."""
    return tile_loop.products(x, w, group_sizes, transposed)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """The sum of `x[i].T dy[i]` over each group's rows, in x's dtype; zeros for an empty group."""
    return tile_loop.weight_gradient(x, dy, group_sizes)


def product(
    x: Float[Array, "M K"], w: Float[Array, "_ _"], *, transposed: bool = False, out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """`x @ w`, or `x @ w.T` with `w [N, K]`, accumulated in f32."""
    contracted = ((1,), (1 if transposed else 0,))
    y = lax.dot_general(x, w, (contracted, ((), ())), precision_of(x.dtype), jnp.float32)
    return y.astype(out_dtype)


def product_gradient(x: Float[Array, "M K"], dy: Float[Array, "M N"]) -> Float[Array, "K N"]:
    """`x.T @ dy` in x's dtype, accumulated in f32."""
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision_of(x.dtype), jnp.float32).astype(x.dtype)


def block_product(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"],
    index: Int[Array, ""],
    *,
    axis: int,
    transposed: bool,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """`product` with the `index`-th matrix along `axis` (0, or 1 where not `transposed`) of `w`."""
    matrix = lax.dynamic_index_in_dim(w, index, axis, keepdims=False)
    return product(x, matrix, transposed=transposed, out_dtype=out_dtype)
