"""One matrix product for each group of consecutive rows, the group sizes known only at run time.

The choice among implementations falls where a program is lowered, by platform: see `platforms`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moejax.kernels import platforms
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import alike


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"] | PackedMatrix, group_sizes: Int[Array, " n"], first: int = 0
) -> Float[Array, "M N"]:
    """`y[i] = x[i] @ w[g]` for each row i of group g; rows past the last group give zeros.

    Args:
      x: rows sorted by group: the first `group_sizes[0]` rows belong to group `first`, and so on.
      w: one matrix a group, of x's dtype, or packed.
      group_sizes: rows of each group from `first` on, int32, their sum at most M; n is G, or with a slice of w less.
      first: names a slice of w without cutting it out, which would be a copy.

    Returns:
      The products, in x's dtype, accumulated in f32. Differentiable in `x` and in a dense `w`; the gradient of an empty
      group's matrix is zero.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    return _grouped_matmul(*alike(x, w, group_sizes), first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array, first: int) -> jax.Array:
    return platforms.products(x, w, _among(group_sizes, first, w.shape[0]))


def _forward(x: jax.Array, w: jax.Array | PackedMatrix, group_sizes: jax.Array, first: int) -> tuple[jax.Array, tuple]:
    return _grouped_matmul(x, w, group_sizes, first), (x, w, group_sizes)


def _backward(first: int, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    x, w, group_sizes = saved
    groups = w.shape[0]
    dx = platforms.products(dy, w, _among(group_sizes, first, groups), transposed=True)
    if isinstance(w, PackedMatrix):
        return dx, None, None
    return dx, _among(platforms.weight_gradient(x, dy, group_sizes), first, groups), None


_grouped_matmul.defvjp(_forward, _backward)


def _among(part: Shaped[Array, "n ..."], first: int, groups: int) -> Shaped[Array, "G ..."]:
    """Entries of the groups from `first` on, among zeros for all others."""
    others = [(first, groups - first - part.shape[0])] + [(0, 0)] * (part.ndim - 1)
    return jnp.pad(part, others) if groups > part.shape[0] else part
