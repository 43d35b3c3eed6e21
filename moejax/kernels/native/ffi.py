"""Calling a handler from traced code."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.sharding import alike

BEST = -1
"""The instruction set that the handlers choose themselves; others by their index in `instruction_sets()`, for tests."""


def call(
    handler: str,
    results: Sequence[tuple[tuple[int, ...], DTypeLike]],
    *operands: jax.Array,
    aliases: Mapping[int, int] | None = None,
    **attributes: Any,
) -> Sequence[jax.Array]:
    """The handler's results, of the given shapes and dtypes.

    Inside shard_map they differ along every axis along which an operand does.

    Args:
      handler: its registered name.
      results: shapes and dtypes.
      operands: arrays.
      aliases: from an operand to the result that takes its memory over.
      attributes: numbers; whole ones reach the handler as 64 bits.
    """
    operands = alike(*operands)
    kind = jax.typeof(operands[0])
    # JAX takes the mark of what differs only beside the mesh that it refers to.
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec()) if kind.manual_axis_type.varying else None
    types = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding, manual_axis_type=kind.manual_axis_type)
        for shape, dtype in results
    ]
    numbers = {name: np.int64(value) if type(value) is int else value for name, value in attributes.items()}
    return jax.ffi.ffi_call(handler, types, input_output_aliases=dict(aliases or {}))(*operands, **numbers)
