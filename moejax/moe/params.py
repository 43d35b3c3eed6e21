"""The weights of one mixture-of-experts block, and how they lie on a mesh."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from moejax.config import Activation
from moejax.sharding import AnyMesh, live_spec, pad_axis, round_up


@struct.dataclass
class ExpertParams:
    """Stacked experts and, where a model has one, the shared expert that every token visits.

    Attributes:
      gate_up: `gate_up[:, :, 0]` is the gate projection and `gate_up[:, :, 1]` the up projection, kept apart so that
        cutting F over the tensor axis never mixes them.
      down: the projection back.
      shared_gate_up, shared_down: the same for the shared expert, or None.
      shared_gate: its sigmoid gate's projection, or None for a shared expert without a gate.
    """

    gate_up: Float[Array, "E D 2 F"]
    down: Float[Array, "E F D"]
    shared_gate_up: Float[Array, "D 2 Fs"] | None = None
    shared_down: Float[Array, "Fs D"] | None = None
    shared_gate: Float[Array, " D"] | None = None


def expert_specs(mesh: AnyMesh, params: ExpertParams, ep: str | None, tp: str | None) -> ExpertParams:
    """The PartitionSpec of each weight: experts over `ep`, hidden width over `tp`, the rest whole on each device."""
    cuts: dict[str, tuple[str | None, ...]] = {
        "gate_up": (ep, None, None, tp),
        "down": (ep, tp, None),
        "shared_gate_up": (None, None, tp),
        "shared_down": (tp, None),
        "shared_gate": (None,),
    }
    present = {name: live_spec(mesh, *cut) for name, cut in cuts.items() if getattr(params, name) is not None}
    return params.replace(**present)  # type: ignore[attr-defined]


def fill_up(params: ExpertParams, ep_size: int, tp_size: int) -> ExpertParams:
    """Zero-pads experts to a multiple of `ep_size` (empty slots) and hidden widths to one of `tp_size`; exact.

    Nothing is copied when they divide already; layers that moejax creates or loads always do.
    """

    def up(x: jax.Array | None, axis: int, multiple: int) -> jax.Array | None:
        return None if x is None else pad_axis(x, axis, round_up(x.shape[axis], multiple))

    return params.replace(  # type: ignore[attr-defined]
        gate_up=up(up(params.gate_up, 0, ep_size), 3, tp_size),
        down=up(up(params.down, 0, ep_size), 1, tp_size),
        shared_gate_up=up(params.shared_gate_up, 2, tp_size),
        shared_down=up(params.shared_down, 0, tp_size),
    )


def activate(gate: jax.Array, activation: Activation) -> jax.Array:
    """The gate's nonlinearity, computed in f32 and returned in the gate's dtype."""
    wide = gate.astype(jnp.float32)
    match activation:
        case "silu":
            out = jax.nn.silu(wide)
        case "gelu":
            out = jax.nn.gelu(wide, approximate=False)
        case "gelu_tanh":
            out = jax.nn.gelu(wide, approximate=True)
        case "relu":
            out = jax.nn.relu(wide)
    return out.astype(gate.dtype)
