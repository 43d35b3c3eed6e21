"""Grouped products on NVIDIA GPUs, by what the GPU can run.

| GPU            | 16-bit floats in widths that fit | all else                     |
|----------------|----------------------------------|------------------------------|
| Hopper         | `hopper`                         | `triton`                     |
| since Ampere   | `triton`                         | `triton`                     |
| before         | `tile_loop`                      | `tile_loop`                  |
"""

import re
from typing import Any

import jax
from jax.extend.backend import get_default_device
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import hopper, tile_loop, triton
from moejax.quantization.packed import PackedMatrix

_HOPPER = re.compile(r"\bG?H\d+\b")
"""In a device's kind, such as "NVIDIA H100 80GB HBM3", "NVIDIA H200" and "NVIDIA GH200 480GB"."""


def products(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"] | Float[Array, "G N K"] | PackedMatrix,
    group_sizes: Int[Array, " G"],
    *,
    transposed: bool,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """`x[i] @ w[g]` for each row i of group g, or `x[i] @ w[g].T` where `transposed`; zeros past the last group."""
    if not _runs_triton():
        return tile_loop.products(x, w, group_sizes, transposed).astype(out_dtype)
    if isinstance(w, PackedMatrix) or not _is_hopper():
        return triton.products(x, w, group_sizes, transposed=transposed, out_dtype=out_dtype)
    kernel = hopper if hopper.supports(x, w, transposed=transposed, out_dtype=out_dtype) else triton
    return kernel.products(x, w, group_sizes, transposed=transposed, out_dtype=out_dtype)


def weight_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], group_sizes: Int[Array, " G"], *, groups: int, out_dtype: DTypeLike
) -> Float[Array, "G K N"]:
    """`x[rows of g].T @ dy[rows of g]` for each group g, accumulated in f32; zeros for an empty group."""
    if not _runs_triton():
        return tile_loop.weight_gradient(x, dy, group_sizes).astype(out_dtype)
    return triton.weight_gradient(x, dy, group_sizes, groups=groups, out_dtype=out_dtype)


def _is_hopper() -> bool:
    return _HOPPER.search(_device().device_kind) is not None


def _runs_triton() -> bool:
    """XLA compiles Triton kernels from Ampere (8.0) on. A GPU that is only described is taken to be one."""
    major = str(getattr(_device(), "compute_capability", "")).partition(".")[0]
    return major not in ("5", "6", "7")


def _device() -> Any:
    """The GPU that the program being traced is for.

    The mesh around it knows its kind, also where its devices are not there; without a mesh the default device counts.
    """
    described, present = jax.sharding.get_abstract_mesh().abstract_device, get_default_device()
    return present if described is None or described.device_kind == present.device_kind else described
