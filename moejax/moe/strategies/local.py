"""What a strategy knows of the mesh, and what it reports."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.config import Activation
from moejax.moe.params import ExpertParams
from moejax.moe.placement import Placement


@struct.dataclass
class Accounting:
    """What one mixture-of-experts block did with its tokens, over the whole mesh.

    Attributes:
      tokens_per_expert: chosen pairs for each expert, before any drop.
      dropped: pairs that found no room; always 0 unless a `capacity_factor` was asked for.
      waves: how often the exchange ran; 1 unless a cell overflowed (always 1 under `all_reduce`).
      ep_bytes: operand bytes of the collectives over the expert axis on each device (the formula is each strategy's).
      tp_bytes: the same over the tensor axis alone.
    """

    tokens_per_expert: Int[Array, " E"]
    dropped: Int[Array, ""]
    waves: Int[Array, ""]
    ep_bytes: Float[Array, ""]
    tp_bytes: Float[Array, ""]


@dataclass(frozen=True, slots=True)
class Local:
    """One block's static facts inside shard_map.

    `ep` and `tp` are mesh axis names, or None where the axis has one device; `others` are further axes that cut the
    tokens (data parallelism).
    """

    ep: str | None
    tp: str | None
    others: tuple[str, ...]
    tp_size: int
    placement: Placement
    activation: Activation
    capacity_factor: float | None = None
    chunks: int = 1
    scales_input: bool = False

    @property
    def ep_size(self) -> int:
        return self.placement.devices

    @property
    def ep_axes(self) -> tuple[str, ...]:
        return (self.ep,) if self.ep else ()

    @property
    def tp_axes(self) -> tuple[str, ...]:
        return (self.tp,) if self.tp else ()

    def ep_index(self) -> jax.Array | int:
        """This device's place along the expert axis."""
        return lax.axis_index(self.ep) if self.ep else 0

    def tp_index(self) -> jax.Array | int:
        """This device's place along the tensor axis."""
        return lax.axis_index(self.tp) if self.tp else 0

    def routed(self, params: ExpertParams) -> ExpertParams:
        """What this device adds up over its experts: the shared expert left out, and the down bias on the tensor
        axis' first device only, since outputs are partial sums over that axis."""
        bias = self.on_first(params.down_bias, self.tp_axes)
        return ExpertParams(params.gate_up, params.down, gate_up_bias=params.gate_up_bias, down_bias=bias)

    def on_first(self, bias: jax.Array | None, axes: tuple[str, ...]) -> jax.Array | None:
        """A bias of partial sums: itself on the first device of the axes that they are summed over, zeros elsewhere."""
        if bias is None:
            return None
        for axis in axes:
            bias = jnp.where(lax.axis_index(axis) == 0, bias, jnp.zeros((), bias.dtype))
        return bias
