"""The weights of one mixture-of-experts block, and how they lie on a mesh."""

import dataclasses
from typing import Any

from flax import struct
from jaxtyping import Array, Float

from moejax.errors import MoejaxError
from moejax.moe.packed import packed_spec
from moejax.quantization.packed import PackedMatrix
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
      gate_up_bias, down_bias: of the experts' projections, or None.
      shared_gate_up_bias, shared_down_bias: of the shared expert's, or None.
    """

    gate_up: Float[Array, "E D 2 F"] | PackedMatrix
    down: Float[Array, "E F D"] | PackedMatrix
    shared_gate_up: Float[Array, "D 2 Fs"] | None = None
    shared_down: Float[Array, "Fs D"] | None = None
    shared_gate: Float[Array, " D"] | None = None
    gate_up_bias: Float[Array, "E 2 F"] | None = None
    down_bias: Float[Array, "E D"] | None = None
    shared_gate_up_bias: Float[Array, "2 Fs"] | None = None
    shared_down_bias: Float[Array, " D"] | None = None


PARAM_NAMES = tuple(field.name for field in dataclasses.fields(ExpertParams))


def expert_specs(mesh: AnyMesh, params: ExpertParams, ep: str | None, tp: str | None) -> ExpertParams:
    """The PartitionSpec of each weight: experts over `ep`, hidden width over `tp`, the rest whole on each device."""
    cuts: dict[str, tuple[str | None, ...]] = {
        "gate_up": (ep, None, None, tp),
        "down": (ep, tp, None),
        "shared_gate_up": (None, None, tp),
        "shared_down": (tp, None),
        "shared_gate": (None,),
        "gate_up_bias": (ep, None, tp),
        "down_bias": (ep, None),
        "shared_gate_up_bias": (None, tp),
        "shared_down_bias": (None,),
    }
    packed = {"gate_up": (ep, None, tp, None), "down": (ep, None, tp)}
    present: dict[str, Any] = {
        name: live_spec(mesh, *cut) for name, cut in cuts.items() if getattr(params, name) is not None
    }
    for name, cut in packed.items():
        if isinstance(getattr(params, name), PackedMatrix):
            present[name] = packed_spec(mesh, cut)
    return params.replace(**present)  # type: ignore[attr-defined]


def fill_up(params: ExpertParams, ep_size: int, tp_size: int) -> ExpertParams:
    """Zero-pads experts to a multiple of `ep_size` (empty slots) and hidden widths to one of `tp_size`; exact.

    Nothing is copied when they divide already; layers that moejax creates or loads always do.
    """

    def up(x: Any, axis: int, multiple: int) -> Any:
        if isinstance(x, PackedMatrix):
            if x.shape[axis] % multiple:
                raise MoejaxError(f"packed experts {x.shape} cannot be cut into {multiple} parts along axis {axis}")
            return x
        return None if x is None else pad_axis(x, axis, round_up(x.shape[axis], multiple))

    return params.replace(  # type: ignore[attr-defined]
        gate_up=up(up(params.gate_up, 0, ep_size), 3, tp_size),
        down=up(up(params.down, 0, ep_size), 1, tp_size),
        shared_gate_up=up(params.shared_gate_up, 2, tp_size),
        shared_down=up(params.shared_down, 0, tp_size),
        gate_up_bias=up(up(params.gate_up_bias, 0, ep_size), 2, tp_size),
        down_bias=up(params.down_bias, 0, ep_size),
        shared_gate_up_bias=up(params.shared_gate_up_bias, 1, tp_size),
    )
