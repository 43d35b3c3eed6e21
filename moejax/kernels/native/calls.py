"""The handlers as functions of JAX arrays, under jit and shard_map, on CPU devices only."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels.native.ffi import BEST, call
from moejax.quantization.packed import PackedMatrix


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
        return call("moejax_packed_products", [(shape, out_dtype)], x, w.blocks, w.scales, group_sizes, isa=isa)[0]
    width, rows = w.shape[2], w.shape[1]
    strides = (width, rows * width) if group_axis == 0 else (rows * width, width)
    attributes = {"transposed": transposed, "row_stride": strides[0], "group_stride": strides[1], "isa": isa}
    shape = (x.shape[0], rows if transposed else width)
    return call("moejax_products", [(shape, out_dtype)], x, w, group_sizes, **attributes)[0]


def gated_products(
    x: Float[Array, "M D"], gate_up: Float[Array, "G D FF"], group_sizes: Int[Array, " G"], *, isa: int = BEST
) -> Float[Array, "M F"]:
    """`silu(x[i] @ gate) * (x[i] @ up)` for each row i of group g, whose gate and up lie side by side in `gate_up[g]`;
    zeros past the last group. Neither product is rounded."""
    shape = (x.shape[0], gate_up.shape[2] // 2)
    return call("moejax_gated_products", [(shape, x.dtype)], x, gate_up, group_sizes, isa=isa)[0]


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
    return call("moejax_weight_gradient", [(shape, out_dtype)], x, dy, group_sizes, isa=isa)[0]


def take(table: Array, index: Int[Array, " M"]) -> Array:
    """`table[index]` along the first axis, of any type; zeros where the index is of no row."""
    return call("moejax_take", [((index.size, *table.shape[1:]), table.dtype)], table, index)[0]


def put(places: Array, rows: Array, index: Int[Array, "B S"]) -> Array:
    """`places [B, G, C, H]`, consumed, with `rows [B, S, G, H]` at their places `[B, S]`; those that are none are
    left out."""
    return call("moejax_put", [(places.shape, places.dtype)], places, rows, index, aliases={0: 0})[0]
