"""Which implementation computes a product: decided by platform where a program is lowered.

| platform | groups known at run time        | one group (a linear layer) |
|----------|---------------------------------|----------------------------|
| CPU      | native kernel, else `tile_loop` | native kernel, else XLA    |
| others   | `tile_loop`                     | XLA                        |

All products are accumulated in f32. Types that the native kernel does not know (float16, float64) go through XLA.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import native, tile_loop
from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix

NATIVE_DTYPES = (jnp.float32, jnp.bfloat16)


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "G _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` (`x[i] @ w[g].T` with `w [G, N, K]`) for each row i of group g, zeros past the last; x's dtype."""

    def on_cpu(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array) -> jax.Array:
        return native.products(x, w, group_sizes, transposed=transposed, out_dtype=x.dtype)

    def anywhere(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array) -> jax.Array:
        return tile_loop.products(x, w, group_sizes, transposed)

    backward_of_packed = isinstance(w, PackedMatrix) and transposed
    return _choose(x, w, group_sizes, cpu=None if backward_of_packed else on_cpu, default=anywhere)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """The sum of `x[i].T dy[i]` over each group's rows, in x's dtype; zeros for an empty group."""

    def on_cpu(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return native.weight_gradient(x, dy, group_sizes, groups=group_sizes.shape[0], out_dtype=x.dtype)

    return _choose(x, dy, group_sizes, cpu=on_cpu, default=tile_loop.weight_gradient)


def product(
    x: Float[Array, "M K"], w: Float[Array, "_ _"], *, transposed: bool = False, out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """`x @ w`, or `x @ w.T` with `w [N, K]`."""

    def on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
        return native.products(x, w[None], _all_rows(x), transposed=transposed, out_dtype=out_dtype)

    def anywhere(x: jax.Array, w: jax.Array) -> jax.Array:
        contracted = ((1,), (1 if transposed else 0,))
        y = lax.dot_general(x, w, (contracted, ((), ())), precision_of(x.dtype), jnp.float32)
        return y.astype(out_dtype)

    return _choose(x, w, cpu=on_cpu, default=anywhere)


def product_gradient(x: Float[Array, "M K"], dy: Float[Array, "M N"]) -> Float[Array, "K N"]:
    """`x.T @ dy` in x's dtype."""

    def on_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
        return native.weight_gradient(x, dy, _all_rows(x), groups=1, out_dtype=x.dtype)[0]

    def anywhere(x: jax.Array, dy: jax.Array) -> jax.Array:
        return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision_of(x.dtype), jnp.float32).astype(x.dtype)

    return _choose(x, dy, cpu=on_cpu, default=anywhere)


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

    def on_cpu(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        here = jnp.arange(w.shape[axis], dtype=jnp.int32) == index
        sizes = jnp.where(here, jnp.int32(x.shape[0]), jnp.int32(0))
        return native.products(x, w, sizes, transposed=transposed, out_dtype=out_dtype, group_axis=axis)

    def anywhere(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(w, index, axis, keepdims=False)
        return product(x, matrix, transposed=transposed, out_dtype=out_dtype)

    return _choose(x, w, index, cpu=on_cpu, default=anywhere)


def _choose(*operands: Any, cpu: Callable[..., jax.Array] | None, default: Callable[..., jax.Array]) -> jax.Array:
    known = all(operand.dtype in NATIVE_DTYPES for operand in operands[:1])
    if cpu is None or not known or not native.available():
        return default(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def _all_rows(x: jax.Array) -> jax.Array:
    return jnp.full(1, x.shape[0], jnp.int32)
