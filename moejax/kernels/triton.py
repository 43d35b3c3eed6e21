"""Grouped products on NVIDIA GPUs of any age, as Triton kernels: float32, float16, bfloat16 and packed matrices.

A tile of rows never straddles two groups, so each program multiplies by one group's matrix. JAX 0.12 calls this backend
of Pallas deprecated, and warns where it is lowered; the other one has no float32 products and no GPU before Hopper.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.precision import precision_of
from moejax.quantization.mxfp4 import BLOCK, bfloat16_bits
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import varying_as


class _Tile(NamedTuple):
    """One program's rows and columns of the result, and the entries it sums over at a time, all powers of two; its
    warps, and the loads under way at once."""

    rows: int
    columns: int
    inner: int
    warps: int = 4
    stages: int = 3
    band: int = 8


# Compiled apart, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype", "group_axis", "interpret"))
def products(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
    group_axis: int = 0,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group.

    Args:
      x: rows sorted by group.
      w: one matrix a group, of x's dtype, or packed.
      group_sizes: rows of each group, int32, their sum at most M.
      group_axis: 1 where a dense w is `[K, G, N]`: blocks of columns of one matrix.
      interpret: run on any platform, slowly.

    Returns:
      The products, accumulated in f32.
    """
    rows, sides = x.shape[0], list(w.shape)
    groups = sides.pop(group_axis)
    depth, width = reversed(sides) if transposed else sides
    if not rows:
        return jnp.zeros((0, width), out_dtype)
    tile = _tile(rows, groups, x.dtype)
    table = _tiles(group_sizes, rows, tile.rows)
    kernel = functools.partial(
        _product_kernel,
        groups=groups,
        depth=depth,
        width=width,
        tile=tile,
        load_weights=_loader(w, transposed, group_axis),
    )
    return _call(
        kernel,
        (table.shape[1] * pl.cdiv(width, tile.columns),),
        (rows, width),
        out_dtype,
        tile,
        interpret,
        table,
        x,
        *_parts(w),
    )


@functools.partial(jax.jit, static_argnames=("groups", "out_dtype", "interpret"))
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
    depth, width = x.shape[1], dy.shape[1]
    if not x.shape[0]:
        return jnp.zeros((groups, depth, width), out_dtype)
    tile = _tile(depth, 1, x.dtype)
    ends = jnp.cumsum(group_sizes)
    kernel = functools.partial(_gradient_kernel, depth=depth, width=width, tile=tile)
    grid = (groups, pl.cdiv(depth, tile.rows), pl.cdiv(width, tile.columns))
    bounds = jnp.stack([ends - group_sizes, ends])
    return _call(kernel, grid, (groups, depth, width), out_dtype, tile, interpret, bounds, x, dy)


def _call(
    kernel,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    tile: _Tile,
    interpret: bool,
    *operands: jax.Array,
) -> jax.Array:
    operands = tuple(varying_as(operand, *operands) for operand in operands)
    out = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operands[0]).manual_axis_type)
    # Named, since without it Pallas on a GPU means another compiler.
    params = plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, out, grid=grid, compiler_params=params, interpret=interpret)(*operands)


def _product_kernel(tiles_ref, x_ref, *refs, groups: int, depth: int, width: int, tile: _Tile, load_weights) -> None:
    *w_refs, out_ref = refs
    i, j = _place(pl.program_id(0), tiles_ref.shape[1], pl.cdiv(width, tile.columns), tile.band)
    group, start, end = tiles_ref[0, i], tiles_ref[1, i], tiles_ref[2, i]
    rows = start + _range(tile.rows)
    columns = j * tile.columns + _range(tile.columns)
    mine = rows < end

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = step * tile.inner + _range(tile.inner)
        w = load_weights(w_refs, group, inner, columns, depth, width, x_ref.dtype)
        return total + _dot(_load(x_ref, rows, inner, mine, inner < depth), w)

    # The tiles past the last group have nothing to sum, so they store zeros.
    steps = lax.select(group < groups, jnp.int32(pl.cdiv(depth, tile.inner)), jnp.int32(0))
    total = lax.fori_loop(0, steps, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    _store(out_ref.at[rows[:, None], columns[None, :]], total, mine, columns < width)


def _place(program: jax.Array, down: int, across: int, band: int) -> tuple[jax.Array, jax.Array]:
    """A program's tile of `down` by `across`: bands of rows one after the other, columns of tiles in a band.

    So programs that run at the same time share rows of x and columns of w, which the cache then holds.
    """
    first = lax.div(program, jnp.int32(band * across)) * band
    within = lax.rem(program, jnp.int32(band * across))
    height = jnp.minimum(jnp.int32(band), down - first)
    return first + lax.rem(within, height), lax.div(within, height)


def _gradient_kernel(bounds_ref, x_ref, dy_ref, out_ref, *, depth: int, width: int, tile: _Tile) -> None:
    group = pl.program_id(0)
    start, end = bounds_ref[0, group], bounds_ref[1, group]
    across = pl.program_id(1) * tile.rows + _range(tile.rows)
    columns = pl.program_id(2) * tile.columns + _range(tile.columns)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        rows = start + step * tile.inner + _range(tile.inner)
        # Foreign rows read as zeros in both factors: a foreign row may be anything, and 0 * inf would poison the sum.
        x = _load(x_ref, rows, across, rows < end, across < depth)
        return total + _dot(x.T, _load(dy_ref, rows, columns, rows < end, columns < width))

    steps = lax.div(end - start + (tile.inner - 1), tile.inner)
    total = lax.fori_loop(0, steps, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    _store(out_ref.at[group, across[:, None], columns[None, :]], total, across < depth, columns < width)


def _loader(w: jax.Array | PackedMatrix, transposed: bool, group_axis: int):
    """The function that loads one group's weights `[inner, columns]`."""
    if isinstance(w, PackedMatrix):
        return functools.partial(_load_packed, transposed=transposed)
    return functools.partial(_load_dense, transposed=transposed, group_axis=group_axis)


def _parts(w: jax.Array | PackedMatrix) -> Sequence[jax.Array]:
    if isinstance(w, PackedMatrix):
        return w.blocks.reshape(*w.blocks.shape[:2], -1), w.scales
    return (w,)


def _load_dense(
    refs, group, inner, columns, depth: int, width: int, dtype: DTypeLike, transposed: bool, group_axis: int
) -> jax.Array:
    (ref,) = refs
    down, across = inner[:, None], columns[None, :]
    where = [across, down] if transposed else [down, across]
    where.insert(group_axis, group)
    return plt.load(ref.at[tuple(where)], mask=(down < depth) & (across < width), other=0)


def _load_packed(refs, group, inner, columns, depth: int, width: int, dtype: DTypeLike, transposed: bool) -> jax.Array:
    """Each byte is loaded once for each of its two values: the second load finds it in the cache."""
    blocks_ref, scales_ref = refs
    down, across = inner[:, None], columns[None, :]
    mask = (down < depth) & (across < width)
    packed, other = (across, down) if transposed else (down, across)
    byte = plt.load(blocks_ref.at[group, other, packed // 2], mask=mask, other=0)
    scale = plt.load(scales_ref.at[group, other, packed // BLOCK], mask=mask, other=0)
    code = (byte.astype(jnp.uint32) >> (packed % 2 * 4).astype(jnp.uint32)) & jnp.uint32(15)
    bits = bfloat16_bits(code, scale.astype(jnp.uint32))
    return lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32).astype(dtype)


def _load(ref, rows, columns, row_mask, column_mask) -> jax.Array:
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=row_mask[:, None] & column_mask[None, :], other=0)


def _store(ref, total, row_mask, column_mask) -> None:
    plt.store(ref, total.astype(ref.dtype), mask=row_mask[:, None] & column_mask[None, :])


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def _range(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)


def _tile(rows: int, groups: int, dtype: DTypeLike) -> _Tile:
    """As many rows as a group has on average, and 16 at least, the fewest that Triton multiplies; less in float32."""
    side = 64 if jnp.dtype(dtype) == jnp.float32 else 128
    average = pl.cdiv(rows, groups)
    return _Tile(max(16, min(side, pl.next_power_of_2(average))), side, 32)


def _tiles(group_sizes: jax.Array, rows: int, tile_rows: int) -> Int[Array, "3 tiles"]:
    """Of each tile of rows: its group, its first row, and one past its group's last row.

    The rows past the last group are one group more. As many tiles as any sizes need; what is left over has no rows.
    """
    sizes = jnp.append(group_sizes, rows - group_sizes.sum())
    ends = jnp.cumsum(sizes)
    counts = lax.div(sizes + (tile_rows - 1), jnp.int32(tile_rows))
    past = jnp.cumsum(counts)
    tile = jnp.arange(rows // tile_rows + sizes.size, dtype=jnp.int32)
    group = jnp.sum(past[:, None] <= tile, 0, dtype=jnp.int32)
    start = (ends - sizes)[group] + (tile - (past - counts)[group]) * tile_rows
    return jnp.stack([group, start, ends[group]])
