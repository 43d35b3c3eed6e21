"""Grouped products on Hopper GPUs by the kernel that JAX ships for them: 16-bit floats, widths in multiples of 32.

It has no weight gradient that compiles for a GPU that is not there; `triton` serves that on Hopper too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.sharding import pad_axis, round_up, varying_as

_ROWS = 8
"""x is padded to a multiple, as the kernel wants it."""

_WIDTH = 32
"""Both widths must be multiples: the kernel copies rows of 64 or 128 bytes, which may not be cut at the end."""


def supports(x: Float[Array, "M K"], w: Float[Array, "G _ _"], *, transposed: bool, out_dtype: DTypeLike) -> bool:
    """Whether the kernel takes operands of these shapes and dtypes."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    width = w.shape[1] if transposed else w.shape[2]
    return x.dtype == w.dtype == out_dtype and x.shape[1] % _WIDTH == 0 and width % _WIDTH == 0


# Compiled apart, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype"))
def products(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group.

    Args:
      x: rows sorted by group, with `w` as `supports` wants them.
      group_sizes: rows of each group, int32, their sum at most M.

    Returns:
      The products, accumulated in f32.
    """
    # Not where no Hopper is: the module brings JAX's own test utilities along.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    rows, depth = x.shape
    width = w.shape[1] if transposed else w.shape[2]
    if not rows:
        return jnp.zeros((0, width), out_dtype)
    operands = (pad_axis(x, 0, round_up(rows, _ROWS)), w, group_sizes)
    x, w, group_sizes = (varying_as(operand, *operands) for operand in operands)
    y = ragged_dot(
        x,
        w,
        group_sizes=group_sizes,
        transpose_rhs=transposed,
        **_blocks(rows, w.shape[0], depth, width),
    )
    # The kernel leaves the rows past the last group as they were in memory.
    mine = (jnp.arange(rows) < group_sizes.sum())[:, None]
    return jnp.where(mine, varying_as(y, x)[:rows], jnp.zeros((), y.dtype))


def _blocks(rows: int, groups: int, depth: int, width: int) -> dict[str, int]:
    """The kernel's tile: rows, columns, and entries summed over at a time, with the loads of these under way at once."""
    return {
        "block_m": 128 if rows >= 128 * groups else 64,
        "block_n": 128 if width % 64 == 0 else 96,
        "block_k": next(size for size in (64, 96, 32) if depth % size == 0),
        "max_concurrent_steps": 4,
        "grid_block_n": 8,
    }
