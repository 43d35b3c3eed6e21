"""Which implementation computes a product: decided by platform where a program is lowered.

| platform | groups known at run time                                         | one group (a linear layer)     |
|----------|------------------------------------------------------------------|--------------------------------|
| CPU      | `native` in f32 and bf16, packed or not                          | `native` in f32 and bf16       |
| CUDA     | `triton` (from Ampere on), packed or not                         | XLA (cuBLAS and Triton)        |
| TPU      | `tpu` (megablox) in f32 and bf16                                 | XLA                            |
| others   | `tile_loop`                                                      | XLA                            |

Where the devices are is known from the mesh (or the default device) when a program is traced. What a kernel does not
take goes through `tile_loop` or XLA: float64, a machine without a C++ compiler, the gradient of
packed matrices on CPU and TPU. All products are accumulated in f32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import native, tile_loop
from moejax.kernels.device import choose
from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import pad_axis


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

    def on_cuda(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array) -> jax.Array:
        from moejax.kernels import cuda

        return cuda.products(x, w, group_sizes, transposed=transposed, out_dtype=x.dtype)

    def on_tpu(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        from moejax.kernels import tpu

        return tpu.products(x, w, group_sizes, transposed=transposed, out_dtype=x.dtype)

    def anywhere(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array) -> jax.Array:
        return tile_loop.products(x, w, group_sizes, transposed)

    if not isinstance(w, PackedMatrix):
        kernels = {"cpu": on_cpu, "cuda": on_cuda, "tpu": on_tpu}
    elif not transposed:
        kernels = {"cpu": on_cpu, "cuda": on_cuda}
    else:
        kernels = {"cuda": on_cuda}
    return choose(x, w, group_sizes, kernels=kernels, default=anywhere)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """The sum of `x[i].T dy[i]` over each group's rows, in x's dtype; zeros for an empty group."""

    def on_cpu(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return native.weight_gradient(x, dy, group_sizes, groups=group_sizes.shape[0], out_dtype=x.dtype)

    def on_cuda(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
        from moejax.kernels import cuda

        return cuda.weight_gradient(x, dy, group_sizes, groups=group_sizes.shape[0], out_dtype=x.dtype)

    def on_tpu(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
        from moejax.kernels import tpu

        return tpu.weight_gradient(x, dy, group_sizes, groups=group_sizes.shape[0], out_dtype=x.dtype)

    kernels = {"cpu": on_cpu, "cuda": on_cuda, "tpu": on_tpu}
    return choose(x, dy, group_sizes, kernels=kernels, default=tile_loop.weight_gradient)


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

    def on_cuda(x: jax.Array, w: jax.Array) -> jax.Array:
        return anywhere(pad_axis(x, 0, 16), w)[:1] if x.shape[0] == 1 else anywhere(x, w)

    # XLA makes a sum of products of a single row, and copies weights to lie as that wants them: on an H100 eight times
    # slower than a product of 16 rows, the fewest that its tensor cores multiply.
    return choose(x, w, kernels={"cpu": on_cpu, "cuda": on_cuda}, default=anywhere)


def product_gradient(x: Float[Array, "M K"], dy: Float[Array, "M N"]) -> Float[Array, "K N"]:
    """`x.T @ dy` in x's dtype."""

    def on_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
        return native.weight_gradient(x, dy, _all_rows(x), groups=1, out_dtype=x.dtype)[0]

    def anywhere(x: jax.Array, dy: jax.Array) -> jax.Array:
        return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision_of(x.dtype), jnp.float32).astype(x.dtype)

    return choose(x, dy, kernels={"cpu": on_cpu}, default=anywhere)


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

    def sizes(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        """All rows belong to the one group."""
        here = jnp.arange(w.shape[axis], dtype=jnp.int32) == index
        return jnp.where(here, jnp.int32(x.shape[0]), jnp.int32(0))

    def on_cpu(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        return native.products(x, w, sizes(x, w, index), transposed=transposed, out_dtype=out_dtype, group_axis=axis)

    def on_cuda(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        from moejax.kernels import cuda

        return cuda.products(x, w, sizes(x, w, index), transposed=transposed, out_dtype=out_dtype, group_axis=axis)

    def anywhere(x: jax.Array, w: jax.Array, index: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(w, index, axis, keepdims=False)
        return product(x, matrix, transposed=transposed, out_dtype=out_dtype)

    # XLA cuts a block out first, which is a copy.
    return choose(x, w, index, kernels={"cpu": on_cpu, "cuda": on_cuda}, default=anywhere)


def _all_rows(x: jax.Array) -> jax.Array:
    return jnp.full(1, x.shape[0], jnp.int32)
