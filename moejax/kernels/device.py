"""What kind of device a program is being traced for."""

from typing import Any

import jax
from jax.extend.backend import get_default_device


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
