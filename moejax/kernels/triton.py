"""Grouped products on NVIDIA GPUs of any age, as Triton kernels: float32, float16, bfloat16 and packed matrices.

A tile of rows never straddles two groups, so each program multiplies by one group's matrix. JAX 0.11 calls this backend
of Pallas deprecated, and warns where it is lowered; the other one has no float32 products and no GPU before Hopper.
"""

import functools
from typing import Any, NamedTuple

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
from moejax.sharding import alike


class _Tile(NamedTuple):
    """How one program works.

    Attributes:
      rows, columns: of its part of the result, powers of two.
      inner: entries it sums over at a time, a power of two.
      warps: of 32 threads.
      stages: loads under way at once, which take as many times the memory of one.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


BAND = 8
"""Tiles of rows whose programs run side by side, so that what they read of x and w is still in the cache."""


# Compiled apart, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype", "group_axis", "roomy", "interpret"))
def products(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
    group_axis: int = 0,
    roomy: bool = False,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group.

    Args:
      x: rows sorted by group.
      w: one matrix a group, of x's dtype, or packed.
      group_sizes: rows of each group, int32, their sum at most M.
      group_axis: 1 where a dense w is `[K, G, N]`: blocks of columns of one matrix.
      roomy: a program may use 150 kB of shared memory; else 100 kB.
      interpret: run on any platform, slowly.

    Returns:
      The products, accumulated in f32.
    """
    rows, sides = x.shape[0], list(w.shape)
    groups = sides.pop(group_axis)
    depth, width = reversed(sides) if transposed else sides
    if not rows:
        return jnp.zeros((0, width), out_dtype)
    packed = isinstance(w, PackedMatrix)
    tile = _packed_tile(rows, groups, x.dtype) if packed else _tile(rows, groups, x.dtype, roomy)
    table = _tiles(group_sizes, rows, tile.rows, interpret)
    down, across = _tile_count(rows, groups, tile.rows), pl.cdiv(width, tile.columns)
    options: dict[str, Any] = {"depth": depth, "width": width, "tile": tile}
    if not packed:
        operands, term = (x, w), functools.partial(_dense_term, transposed=transposed, group_axis=group_axis, **options)
    elif transposed:
        operands, term = (x, _bytes(w), w.scales), functools.partial(_transposed_packed_term, **options)
    else:
        # The earlier and the later of two values that share a byte, each side by side.
        pairs = jnp.moveaxis(x.reshape(rows, -1, 2), 2, 0)
        operands, term = (pairs, w.blocks, w.scales), functools.partial(_packed_term, **options)
    kernel = functools.partial(_product_kernel, groups=groups, down=down, term=term, **options)
    shape, resources = (rows, width), (tile.warps, tile.stages)
    return _call(kernel, (down * across,), shape, out_dtype, *resources, interpret, table, *operands)


@functools.partial(jax.jit, static_argnames=("groups", "out_dtype", "roomy", "interpret"))
def weight_gradient(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    *,
    groups: int,
    out_dtype: DTypeLike,
    roomy: bool = False,
    interpret: bool = False,
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in f32; zeros for an empty group.

    `roomy` and `interpret` as for `products`.
    """
    depth, width = x.shape[1], dy.shape[1]
    if not x.shape[0]:
        return jnp.zeros((groups, depth, width), out_dtype)
    tile = _tile(depth, 1, x.dtype, roomy)
    ends = jnp.cumsum(group_sizes)
    kernel = functools.partial(_gradient_kernel, depth=depth, width=width, tile=tile)
    grid = (groups, pl.cdiv(depth, tile.rows), pl.cdiv(width, tile.columns))
    bounds = jnp.stack([ends - group_sizes, ends])
    shape, resources = (groups, depth, width), (tile.warps, tile.stages)
    return _call(kernel, grid, shape, out_dtype, *resources, interpret, bounds, x, dy)


def _call(
    kernel,
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    warps: int,
    stages: int,
    interpret: bool,
    *operands: jax.Array,
) -> jax.Array:
    operands = alike(*operands)
    out = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operands[0]).manual_axis_type)
    # Named, since without it Pallas on a GPU means another compiler.
    params = plt.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, out, grid=grid, compiler_params=params, interpret=interpret)(*operands)


def _product_kernel(tiles_ref, *refs, groups: int, down: int, depth: int, width: int, tile: _Tile, term) -> None:
    *operands, out_ref = refs
    i, j = _place(pl.program_id(0), down, pl.cdiv(width, tile.columns))
    group, start, end = tiles_ref[0, i], tiles_ref[1, i], tiles_ref[2, i]
    rows = start + _range(tile.rows)
    columns = j * tile.columns + _range(tile.columns)
    mine = rows < end

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        return total + term(operands, group, rows, mine, step, columns)

    # The tiles past the last group have nothing to sum, so they store zeros.
    steps = lax.select(group < groups, jnp.int32(pl.cdiv(depth, tile.inner)), jnp.int32(0))
    total = lax.fori_loop(0, steps, add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    _store(out_ref.at[rows[:, None], columns[None, :]], total, mine, columns < width)


def _place(program: jax.Array, down: int, across: int) -> tuple[jax.Array, jax.Array]:
    """A program's tile among `down` times `across`: band by band of BAND tiles of rows, within it column by column."""
    first = lax.div(program, jnp.int32(BAND * across)) * BAND
    within = lax.rem(program, jnp.int32(BAND * across))
    height = jnp.minimum(jnp.int32(BAND), down - first)
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


def _dense_term(
    refs, group, rows, mine, step, columns, depth: int, width: int, tile: _Tile, transposed: bool, group_axis: int
) -> jax.Array:
    """What one step adds: some entries of the rows of x times those of the group's matrix."""
    x_ref, w_ref = refs
    inner = step * tile.inner + _range(tile.inner)
    down, across = inner[:, None], columns[None, :]
    where = [across, down] if transposed else [down, across]
    where.insert(group_axis, group)
    w = plt.load(w_ref.at[tuple(where)], mask=(down < depth) & (across < width), other=0)
    return _dot(_load(x_ref, rows, inner, mine, inner < depth), w)


def _packed_term(refs, group, rows, mine, step, columns, depth: int, width: int, tile: _Tile) -> jax.Array:
    """The same with a packed matrix, whose bytes are loaded once, many next to each other."""
    pairs_ref, blocks_ref, scales_ref = refs
    count, size = tile.inner // BLOCK, BLOCK // 2
    block = step * count + _range(count)
    there = (columns < width)[:, None] & (block < depth // BLOCK)[None, :]
    scale = plt.load(scales_ref.at[group, columns[:, None], block[None, :]], mask=there, other=0).astype(jnp.uint32)
    where = group, columns[:, None, None], block[None, :, None], _range(size)[None, None, :]
    byte = plt.load(blocks_ref.at[where], mask=there[:, :, None], other=0).astype(jnp.uint32)
    half = step * (tile.inner // 2) + _range(tile.inner // 2)

    def product(place: int, code: jax.Array) -> jax.Array:
        w = _values(code, scale[:, :, None], pairs_ref.dtype).reshape(tile.columns, tile.inner // 2)
        mask = mine[:, None] & (half < depth // 2)[None, :]
        return _dot(plt.load(pairs_ref.at[place, rows[:, None], half[None, :]], mask=mask, other=0), w.T)

    return product(0, byte & jnp.uint32(15)) + product(1, byte >> jnp.uint32(4))


def _transposed_packed_term(refs, group, rows, mine, step, columns, depth: int, width: int, tile: _Tile) -> jax.Array:
    """The same for the gradient of the rows, packed along the columns; each byte is loaded for each of its values."""
    x_ref, blocks_ref, scales_ref = refs
    inner = step * tile.inner + _range(tile.inner)
    down, across = inner[:, None], columns[None, :]
    mask = (down < depth) & (across < width)
    byte = plt.load(blocks_ref.at[group, down, across // 2], mask=mask, other=0).astype(jnp.uint32)
    scale = plt.load(scales_ref.at[group, down, across // BLOCK], mask=mask, other=0).astype(jnp.uint32)
    code = (byte >> (across % 2 * 4).astype(jnp.uint32)) & jnp.uint32(15)
    return _dot(_load(x_ref, rows, inner, mine, inner < depth), _values(code, scale, x_ref.dtype))


def _values(code: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    bits = bfloat16_bits(code, scale)
    return lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32).astype(dtype)


def _bytes(w: PackedMatrix) -> jax.Array:
    return w.blocks.reshape(*w.blocks.shape[:2], -1)


def _load(ref, rows, columns, row_mask, column_mask) -> jax.Array:
    return plt.load(ref.at[rows[:, None], columns[None, :]], mask=row_mask[:, None] & column_mask[None, :], other=0)


def _store(ref, total, row_mask, column_mask) -> None:
    plt.store(ref, total.astype(ref.dtype), mask=row_mask[:, None] & column_mask[None, :])


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def _range(size: int) -> jax.Array:
    return lax.iota(jnp.int32, size)


def _tile(rows: int, groups: int, dtype: DTypeLike, roomy: bool) -> _Tile:
    """The fastest on an H100 for the rows that a group has on average, of those that fit into shared memory.

    Few rows only read weights, and 16 is the fewest that Triton multiplies.
    """
    height = max(16, pl.next_power_of_2(pl.cdiv(rows, groups)))
    if jnp.dtype(dtype) == jnp.float32:
        return _Tile(16, 64, 64, 4, 4) if height == 16 else _Tile(min(height, 64), 64, 32, 4, 3)
    if height <= 32:
        return _Tile(height, 128, 64, 4, 4)
    if height == 64:
        return _Tile(64, 128, 64, 4, 3)
    return _Tile(128, 256, 64, 8, 3) if roomy else _Tile(128, 128, 64, 8, 3)


def _packed_tile(rows: int, groups: int, dtype: DTypeLike) -> _Tile:
    """The same for packed matrices, whose unpacking takes registers."""
    height = max(16, pl.next_power_of_2(pl.cdiv(rows, groups)))
    if height == 16:
        return _Tile(16, 32, 128, 4, 4)
    if height <= 64 or jnp.dtype(dtype) == jnp.float32:
        return _Tile(min(height, 64), 64, 64, 4, 3)
    return _Tile(128, 64, 128, 4, 2)


def _tiles(group_sizes: jax.Array, rows: int, tile_rows: int, interpret: bool) -> Int[Array, "3 _"]:
    """Of each of `_tile_count` tiles of rows: its group, its first row, and one past its group's last row.

    The rows past the last group are one group more. As many tiles as any sizes need; what is left over has no rows. One
    kernel, since XLA takes five, which cost a decode step as much as reading an expert.
    """
    groups = group_sizes.size
    kernel = functools.partial(_tiles_kernel, groups=groups, rows=rows, tile_rows=tile_rows)
    programs = pl.cdiv(_tile_count(rows, groups, tile_rows), _AT_ONCE)
    return _call(kernel, (programs,), (3, programs * _AT_ONCE), jnp.int32, 4, 1, interpret, group_sizes)


_AT_ONCE = 16
"""Tiles that one program looks up."""


def _tile_count(rows: int, groups: int, tile_rows: int) -> int:
    """The whole ones, and one that is not for each group with rows."""
    return rows // tile_rows + min(groups + 1, rows)


def _tiles_kernel(sizes_ref, out_ref, *, groups: int, rows: int, tile_rows: int) -> None:
    group = _range(pl.next_power_of_2(groups + 1))
    sizes = plt.load(sizes_ref.at[group], mask=group < groups, other=0)
    sizes = jnp.where(group == groups, rows - jnp.sum(sizes), sizes)
    counts = lax.div(sizes + (tile_rows - 1), jnp.int32(tile_rows))
    ends, past = jnp.cumsum(sizes), jnp.cumsum(counts)
    tile = pl.program_id(0) * _AT_ONCE + _range(_AT_ONCE)
    before = (past[:, None] <= tile[None, :]) & (group <= groups)[:, None]
    found = jnp.sum(before.astype(jnp.int32), 0)
    mine = group[:, None] == found[None, :]

    def of_group(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, values[:, None], 0), 0)

    start = of_group(ends - sizes - (past - counts) * tile_rows) + tile * tile_rows
    for row, values in enumerate((found, start, of_group(ends))):
        plt.store(out_ref.at[row, tile], values)
