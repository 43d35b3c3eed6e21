"""Grouped products on TPUs by megablox, the kernels that JAX ships for them, which take float32 and bfloat16."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import alike, pad_axis, round_up, varying_as


def supports(x: Float[Array, "M K"], w: Array | PackedMatrix) -> bool:
    """Whether the kernels take operands of these dtypes."""
    return not isinstance(w, PackedMatrix) and x.dtype == w.dtype and x.dtype in (jnp.float32, jnp.bfloat16)


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group.

    Args:
      x: rows sorted by group, with `w` as `supports` wants them.
      group_sizes: rows of each group, int32, their sum at most M.
      interpret: run on any platform, slowly, and only outside shard_map.

    Returns:
      The products, accumulated in f32.
    """
    (rows, depth), width = x.shape, w.shape[1] if transposed else w.shape[2]
    if not rows:
        return jnp.zeros((0, width), out_dtype)
    tiling = _tiling(rows, depth, width, w.shape[0], x.dtype)
    kernel = functools.partial(
        gmm, preferred_element_type=out_dtype, tiling=tiling, transpose_rhs=transposed, interpret=interpret
    )
    y = _call(kernel, pad_axis(x, 0, round_up(rows, tiling[0])), w, group_sizes)[:rows]
    # Of the rows past the last group the kernel writes only those that share a tile with it.
    mine = (jnp.arange(rows) < group_sizes.sum())[:, None]
    return jnp.where(mine, y, jnp.zeros((), y.dtype))


def weight_gradient(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    *,
    groups: int,
    out_dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in f32; zeros for an empty group."""
    (rows, depth), width = x.shape, dy.shape[1]
    if not rows:
        return jnp.zeros((groups, depth, width), out_dtype)
    tiling = _tiling(rows, depth, width, groups, x.dtype)
    kernel = functools.partial(tgmm, preferred_element_type=out_dtype, tiling=tiling, interpret=interpret)
    x, dy = (pad_axis(a, 0, round_up(rows, tiling[0])) for a in (x, dy))
    return _call(kernel, x.T, dy, group_sizes)


def _call(kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """The kernel under the promotion of dtypes that it was written for, and with the precision that it does not name.

    Inside shard_map, another one over no axes tells JAX not to ask along which axes the result varies: the kernel does
    not say so, and the mark is put on here.
    """
    operands = alike(*operands)
    if jax.typeof(operands[0]).manual_axis_type.varying:
        anywhere = PartitionSpec()
        kernel = jax.shard_map(kernel, in_specs=anywhere, out_specs=anywhere, check_vma=False)
    precision = precision_of(operands[0].dtype).name.lower()
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        return varying_as(kernel(*operands), *operands)


def _tiling(rows: int, depth: int, width: int, groups: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Rows, depth and width of a tile; two of each operand's and the f32 sums must fit in 16 MiB.

    As many rows as a group has on average, within what keeps the matrix unit busy.
    """
    side = 512 if jnp.dtype(dtype) == jnp.float32 else 1024
    average = pl.next_power_of_2(pl.cdiv(rows, groups))
    return max(min(128, round_up(rows, 16)), min(512, average)), min(side, depth), min(side, width)
