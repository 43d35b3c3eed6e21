"""Experts' matrices that stay in MXFP4 in device memory, as parameters of a layer."""

import jax.numpy as jnp
from flax import nnx

from moejax.quantization.mxfp4 import BLOCK, check_width
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import AnyMesh, live_spec, sharded_param


class PackedExperts(nnx.Module):
    """One projection of all experts: `blocks uint8 [slots, *N, K/32, 16]` and `scales uint8 [slots, *N, K/32]`.

    `cut` names the mesh axis of each axis of `scales`. Zeros at first: packed weights come from a checkpoint.
    """

    def __init__(self, outputs: tuple[int, ...], inputs: int, cut: tuple[str | None, ...], mesh: AnyMesh | None):
        """For `outputs` (slots and the axes N) and K = `inputs`."""
        check_width(inputs)
        shape = (*outputs, inputs // BLOCK)
        self.blocks = sharded_param(jnp.zeros((*shape, BLOCK // 2), jnp.uint8), mesh, *cut, None)
        self.scales = sharded_param(jnp.zeros(shape, jnp.uint8), mesh, *cut)

    def matrix(self) -> PackedMatrix:
        """The matrices as `moejax.moe` takes them."""
        return PackedMatrix(self.blocks[...], self.scales[...])


def packed_spec(mesh: AnyMesh, cut: tuple[str | None, ...]) -> PackedMatrix:
    """The PartitionSpec of each array of a packed matrix."""
    return PackedMatrix(live_spec(mesh, *cut, None), live_spec(mesh, *cut))  # type: ignore[arg-type]
