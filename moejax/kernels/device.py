"""What kind of device a program is being traced for, and the choice of a kernel by it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.backend import get_default_device

from moejax.kernels import native

DTYPES = {
    "cpu": (jnp.float32, jnp.bfloat16),
    "cuda": (jnp.float32, jnp.bfloat16, jnp.float16),
    "tpu": (jnp.float32, jnp.bfloat16),
}
"""What a platform's kernels take."""


_ROOMY = re.compile(r"\b(A30|A[18]00|G?H\d+|G?B\d{3})\b")
"""In the kind of a device whose programs may use 163 kB of shared memory or more, such as "NVIDIA A100-SXM4-80GB",
"NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB" and "NVIDIA B200"; others have 99 kB."""


def device_of(x: jax.Array) -> Any:
    """The kind of device (`.platform`, `.device_kind`) that an operand lies on; a device itself where it is at hand.

    Its mesh knows, also where its devices are only described or a backward rule is traced; without one the default
    device counts.
    """
    described, present = jax.typeof(x).sharding.mesh.abstract_device, get_default_device()
    return present if described is None or described.device_kind == present.device_kind else described


def platform_of(x: jax.Array) -> str:
    """Its platform as lowering names it: "cpu", "cuda", "tpu" or another."""
    platform = device_of(x).platform
    return "cuda" if platform == "gpu" else platform


def roomy(device: Any) -> bool:
    """Whether a program may use 150 kB of shared memory."""
    return _ROOMY.search(device.device_kind) is not None


def choose(*operands: Any, kernels: Mapping[str, Callable[..., Any]], default: Callable[..., Any]) -> Any:
    """The result of the kernel for the operands' devices where there is one and it takes their type.

    Only that one is traced, since Pallas takes a second to import. A program lowered for other devices after all runs
    the default.

    Args:
      operands: pytrees; the first is an array whose device and dtype count.
      kernels: by platform.
      default: the same function in plain XLA.
    """
    platform, dtype = platform_of(operands[0]), operands[0].dtype
    if platform not in kernels or dtype not in DTYPES[platform] or (platform == "cpu" and not native.available()):
        return default(*operands)
    return lax.platform_dependent(*operands, **{platform: kernels[platform]}, default=default)
