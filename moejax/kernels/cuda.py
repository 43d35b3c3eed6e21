"""Grouped products on NVIDIA GPUs: one Triton kernel from Ampere on, no kernel before.

JAX ships a kernel for Hopper alone. On an H100 it was slower at every size measured (1.1 to 1.4 times with many rows),
most of all in decode (6 times), since it reads the matrices of groups without rows too.
"""

import re
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import tile_loop, triton
from moejax.kernels.device import device_of
from moejax.quantization.packed import PackedMatrix

_ROOMY = re.compile(r"\b(A30|A[18]00|G?H\d+|G?B\d{3})\b")
"""In the kind of a device whose programs may use 163 kB of shared memory or more, such as "NVIDIA A100-SXM4-80GB",
"NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB" and "NVIDIA B200"; others have 99 kB."""


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
    return triton.products(x, w, group_sizes, roomy=_roomy(device), **options)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"], *, groups: int, out_dtype: DTypeLike
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in f32; zeros for an empty group."""
    device = device_of(x)
    if not _runs_triton(device):
        return tile_loop.weight_gradient(x, dy, group_sizes).astype(out_dtype)
    return triton.weight_gradient(x, dy, group_sizes, groups=groups, out_dtype=out_dtype, roomy=_roomy(device))


def _runs_triton(device: Any) -> bool:
    """XLA compiles Triton kernels from Ampere (8.0) on. A GPU that is only described is taken to be young enough."""
    return str(getattr(device, "compute_capability", "")).partition(".")[0] not in ("5", "6", "7")


def _roomy(device: Any) -> bool:
    return _ROOMY.search(device.device_kind) is not None
