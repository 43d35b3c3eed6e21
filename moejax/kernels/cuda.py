"""Grouped products on NVIDIA GPUs: one Triton kernel from Ampere on, no kernel before.

JAX ships a kernel for Hopper alone. On an H100 it was slower at every size measured (1.05 to 1.3 times with many rows),
most of all in decode (5 times), since it reads the matrices of groups without rows too.
"""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import tile_loop, triton
from moejax.kernels.device import device_of, roomy
from moejax.quantization.packed import PackedMatrix


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "_ _ _"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
    group_axis: int = 0,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group.

    With `group_axis` 1 a dense w is `[K, G, N]`.
    """
    device = device_of(x)
    if not _runs_triton(device):
        w = w if isinstance(w, PackedMatrix) else jnp.moveaxis(w, group_axis, 0)
        return tile_loop.products(x, w, group_sizes, transposed).astype(out_dtype)
    options = {"transposed": transposed, "out_dtype": out_dtype, "group_axis": group_axis}
    return triton.products(x, w, group_sizes, roomy=roomy(device), **options)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"], *, groups: int, out_dtype: DTypeLike
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in f32; zeros for an empty group."""
    device = device_of(x)
    if not _runs_triton(device):
        return tile_loop.weight_gradient(x, dy, group_sizes).astype(out_dtype)
    return triton.weight_gradient(x, dy, group_sizes, groups=groups, out_dtype=out_dtype, roomy=roomy(device))


def _runs_triton(device: Any) -> bool:
    """XLA compiles Triton kernels from Ampere (8.0) on. A GPU that is only described is taken to be young enough."""
    return str(getattr(device, "compute_capability", "")).partition(".")[0] not in ("5", "6", "7")
