"""The handlers as functions of JAX arrays, under jit and shard_map, on CPU devices only."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.quantization.packed import PackedMatrix
from moejax.sharding import varying_as

BEST = -1
"""The instruction set that the handlers choose themselves; others by their index in `instruction_sets()`, for tests."""


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
    group_axis: int = 0,
    isa: int = BEST,
) -> Float[Array, "M _"]:
    """`y[i] = x[i] @ w[g]` for each row i of group g, accumulated in float32; rows past the last group give zeros.

    Args:
      x: rows sorted by group, float32 or bfloat16.
      w: `[G, K, N]`, one matrix a group, of x's dtype; or packed.
      group_sizes: rows of each group, int32.
      transposed: w is `[G, N, K]`.
      out_dtype: float32 or bfloat16.
      group_axis: 1 where w is `[K, G, N]`: blocks of columns of one matrix.
      isa: which instruction set computes it.
    """
    if isinstance(w, PackedMatrix):
        shape = (x.shape[0], w.shape[2])
        return _call("moejax_packed_products", shape, out_dtype, x, w.blocks, w.scales, group_sizes, isa=isa)
    width, rows = w.shape[2], w.shape[1]
    strides = (width, rows * width) if group_axis == 0 else (rows * width, width)
    attributes = {"transposed": transposed, "row_stride": strides[0], "group_stride": strides[1], "isa": isa}
    shape = (x.shape[0], rows if transposed else width)
    return _call("moejax_products", shape, out_dtype, x, w, group_sizes, **attributes)


def weight_gradient(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    *,
    groups: int,
    out_dtype: DTypeLike,
    isa: int = BEST,
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in float32; zeros for an empty group.

    Args:
      x: rows sorted by group, float32 or bfloat16.
      dy: of x's dtype.
      group_sizes: rows of each group, int32.
      groups: how many there are.
      out_dtype: float32 or bfloat16.
      isa: which instruction set computes it.
    """
    shape = (groups, x.shape[1], dy.shape[1])
    return _call("moejax_weight_gradient", shape, out_dtype, x, dy, group_sizes, isa=isa)


def _call(handler: str, shape: tuple[int, ...], dtype: DTypeLike, *operands: jax.Array, **attributes: int) -> jax.Array:
    """Inside shard_map the result differs along every axis along which an operand does."""
    operands = tuple(varying_as(operand, *operands) for operand in operands)
    kind = jax.typeof(operands[0])
    # JAX takes the mark of what differs only beside the mesh that it refers to.
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec()) if kind.manual_axis_type.varying else None
    result = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding, manual_axis_type=kind.manual_axis_type)
    numbers = {name: value if isinstance(value, bool) else np.int64(value) for name, value in attributes.items()}
    return jax.ffi.ffi_call(handler, result)(*operands, **numbers)
