"""Grouped products on NVIDIA GPUs: the Hopper kernel where it applies, Triton elsewhere."""

import re

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moejax.kernels import hopper, triton
from moejax.kernels.device import device_of
from moejax.kernels.triton import weight_gradient as weight_gradient
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
    if isinstance(w, PackedMatrix) or not _HOPPER.search(device_of(x).device_kind):
        return triton.products(x, w, group_sizes, transposed=transposed, out_dtype=out_dtype)
    kernel = hopper if hopper.supports(x, w, transposed=transposed, out_dtype=out_dtype) else triton
    return kernel.products(x, w, group_sizes, transposed=transposed, out_dtype=out_dtype)
