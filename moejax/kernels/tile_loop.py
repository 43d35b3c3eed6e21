"""Grouped products by XLA alone: the reference of every other implementation, and what runs where there is none.

XLA's own `ragged_dot` is a dense expansion on CPU and GPU (every row times every group's matrix). Here a loop walks
over tiles of rows that belong to one group: the work is that of the rows present, and matrices of empty groups are
never read. Packed matrices are unpacked one group's at a time, inside the loop.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.precision import precision_of
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import pad_axis, varying_as

LARGEST_TILE = 128
"""Rows. Larger tiles waste more on half-filled ones than they gain: 64 and 128 measured best, 512 twice slower."""

Tiles: TypeAlias = tuple[Int[Array, " G"], Int[Array, " G"], Int[Array, " G"]]


def products(
    x: Float[Array, "M K"], w: Float[Array, "G _ _"] | PackedMatrix, group_sizes: Int[Array, " G"], transposed: bool
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]`, or `x[i] @ w[g].T` where `w` is `[G, N, K]`, group by group and tile by tile; zeros past the last.

    The loop within a group keeps XLA from merging the unpacking into each tile's product, which costs far more.
    """
    groups, inputs, outputs = w.shape
    rows = _tile_rows(x.shape[0], groups)
    tiles = _tiles(group_sizes, rows)
    padded = pad_axis(x, 0, x.shape[0] + rows)

    def of_group(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        group = _group(tiles, state[0])
        matrix, past = _matrix(w, group, x.dtype), tiles[2][group]

        def of_tile(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, out = state
            _, start, _ = _tile(tiles, i, rows)
            product = _dot(lax.dynamic_slice_in_dim(padded, start, rows), matrix.T if transposed else matrix)
            # Rows past the group's end are overwritten by the next group's tiles, which come later.
            return i + 1, lax.dynamic_update_slice_in_dim(out, product, start, 0)

        return lax.while_loop(lambda state: state[0] < past, of_tile, state)

    initial = jnp.zeros((padded.shape[0], inputs if transposed else outputs), x.dtype)
    out = _walk(tiles, of_group, initial, x, *jax.tree.leaves(w), group_sizes)
    return _zero_past(out[: x.shape[0]], group_sizes)


def _matrix(w: jax.Array | PackedMatrix, group: jax.Array, dtype: DTypeLike) -> jax.Array:
    if isinstance(w, PackedMatrix):
        return w.dense(group, dtype)
    return lax.dynamic_index_in_dim(w, group, keepdims=False)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K N"]:
    """The sum of `x[i].T dy[i]` over the rows i of each group, in x's dtype, accumulated in f32; zeros without rows."""
    groups = group_sizes.shape[0]
    rows = _tile_rows(x.shape[0], groups)
    tiles = _tiles(group_sizes, rows)
    initial = jnp.zeros((groups, x.shape[1], dy.shape[1]), jnp.float32)
    x_padded, dy_padded = (pad_axis(a, 0, a.shape[0] + rows) for a in (x, dy))

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, dw = state
        group, start, end = _tile(tiles, i, rows)
        mine = (start + jnp.arange(rows) < end)[:, None]
        # Zeroed in both factors: a foreign row of dy may be anything, and 0 * inf would poison the sum.
        x_tile = jnp.where(mine, lax.dynamic_slice_in_dim(x_padded, start, rows), jnp.zeros((), x.dtype))
        dy_tile = jnp.where(mine, lax.dynamic_slice_in_dim(dy_padded, start, rows), jnp.zeros((), dy.dtype))
        so_far = lax.dynamic_index_in_dim(dw, group, keepdims=False)
        product = lax.dot_general(x_tile, dy_tile, (((0,), (0,)), ((), ())), precision_of(x.dtype), jnp.float32)
        return i + 1, lax.dynamic_update_index_in_dim(dw, so_far + product, group, 0)

    return _walk(tiles, step, initial, x, dy, group_sizes).astype(x.dtype)


def _tile_rows(rows: int, groups: int) -> int:
    """The power of two that a group has rows on average, at most LARGEST_TILE."""
    average = -(-rows // groups)
    return min(LARGEST_TILE, 1 << (average - 1).bit_length())


def _tiles_for(size: jax.Array, rows: int) -> jax.Array:
    return lax.div(size + jnp.int32(rows - 1), jnp.int32(rows))


def _tiles(group_sizes: jax.Array, rows: int) -> Tiles:
    """For each group: its first row, one past its last row, one past its last tile."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends, jnp.cumsum(_tiles_for(group_sizes, rows))


def _group(tiles: Tiles, i: jax.Array) -> jax.Array:
    """Tile i's group."""
    return jnp.sum(tiles[2] <= i, dtype=jnp.int32)


def _tile(tiles: Tiles, i: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tile i's group, its first row, and one past the last row of that group."""
    starts, ends, last_tiles = tiles
    group = _group(tiles, i)
    tiles_of_group = _tiles_for(ends[group] - starts[group], rows)
    return group, starts[group] + (i - (last_tiles[group] - tiles_of_group)) * rows, ends[group]


def _walk(tiles: Tiles, step, initial: jax.Array, *operands: jax.Array) -> jax.Array:
    count = tiles[2][-1]
    return lax.while_loop(
        lambda state: state[0] < count, step, (varying_as(jnp.int32(0), count), varying_as(initial, *operands))
    )[1]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def _zero_past(y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(y.shape[0]) < group_sizes.sum())[:, None], y, jnp.zeros((), y.dtype))
