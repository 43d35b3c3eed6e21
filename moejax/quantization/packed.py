"""Matrices kept in memory as MXFP4: 17 bytes for 32 values, unpacked where they are used."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from moejax.quantization.mxfp4 import BLOCK, unpack
from moejax.sharding import round_up


@struct.dataclass
class PackedMatrix:
    """Stands for a dense `[G, K, *N]`, packed along K, the axis that products sum over.

    Zero bytes are zero weights, whatever their scale. There is no gradient: packed weights are not trained.

    Attributes:
      blocks: 16 bytes for each 32 values along K, in the checkpoint's order.
      scales: their powers of two.
    """

    blocks: UInt8[Array, "G *N n 16"]
    scales: UInt8[Array, "G *N n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense array."""
        groups, *outputs, count = self.scales.shape
        return groups, count * BLOCK, *outputs

    def __getitem__(self, group: int | jax.Array) -> Float[Array, "K *N"]:
        """One group's dense array in bfloat16, in which every value is exact."""
        return self.dense(group, jnp.bfloat16)

    def dense(self, group: int | jax.Array, dtype: DTypeLike) -> Float[Array, "K *N"]:
        """One group's dense array in `dtype`."""
        return jnp.moveaxis(unpack(self.blocks[group], self.scales[group], dtype), -1, 0)

    def reshape(self, *shape: int) -> "PackedMatrix":
        """The stand-in for the dense array's reshape, which may split and merge the axes N.

        Raises:
            ValueError: G or K would change.
        """
        groups, width, *outputs = shape
        if (groups, width) != self.shape[:2]:
            raise ValueError(f"packed {self.shape} cannot become {shape}: the first two axes must stay")
        *_, count = self.scales.shape
        return PackedMatrix(
            self.blocks.reshape(groups, *outputs, count, BLOCK // 2), self.scales.reshape(groups, *outputs, count)
        )


def packed_width(width: int, tp_size: int) -> int:
    """The width that each of `tp_size` devices can hold a whole number of blocks of, the rest zeros."""
    return round_up(width, BLOCK * tp_size)
