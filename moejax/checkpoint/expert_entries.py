"""The tensors of a mixture of experts, and of dense MLPs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moejax.checkpoint.entries import Entry, LayerNames, linear, whole_tensor
from moejax.checkpoint.pieces import Piece, whole
from moejax.config import MoEConfig
from moejax.quantization.mxfp4 import BLOCK

PACKED_ROLES = (".blocks", ".scales")
"""How the roles of packed experts end."""


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """How a checkpoint holds its experts.

    Attributes:
        stacked: all experts of a layer in one tensor for gate and up together and one for down; otherwise each expert
            has three of its own.
        inputs_first: stacked tensors are [E, in, out] instead of [E, out, in].
        interleaved: gate and up alternate along their axis instead of standing one after the other.
        correction_row: the router's correction is a row, [1, E], instead of [E].
    """

    stacked: bool = False
    inputs_first: bool = False
    interleaved: bool = False
    correction_row: bool = False

    def rows(self, part: str, F: int) -> slice:
        """Where gate or up stands among the 2 F of a stacked tensor."""
        which = ("gate", "up").index(part)
        return slice(which, 2 * F, 2) if self.interleaved else slice(which * F, (which + 1) * F)


SEPARATE = ExpertTensors()
"""Each expert in tensors of its own, the commonest form."""


def moe_entries(
    config: MoEConfig, names: LayerNames, experts: ExpertTensors, slot_of: Sequence[int]
) -> Iterator[Entry]:
    """Router, experts and shared expert of one block."""
    D, E = config.hidden_size, config.num_experts
    yield linear(names.role("router"), names.tensor("router"), D, E)
    learned = {
        "router_bias": config.router.bias,
        "correction": config.router.correction,
        "expert_scale": config.router.expert_scale,
    }
    for name, present in learned.items():
        if present:
            shape = (1, E) if name == "correction" and experts.correction_row else (E,)
            yield names.role(name), Piece(whole((E,)), names.tensor(name), whole(shape)), shape
    yield from _stacked(config, names, experts, slot_of) if experts.stacked else _separate(config, names, slot_of)
    if config.shared_intermediate_size:
        yield from _mlp(names, D, config.shared_intermediate_size, config.shared_bias, "shared.", "shared_")
    if config.shared_gate:
        tensor = names.tensor("shared_gate")
        yield names.role("shared_gate"), Piece(whole((D,)), tensor, whole((1, D))), (1, D)


def dense_entries(names: LayerNames, D: int, F: int, bias: bool) -> Iterator[Entry]:
    """A dense MLP."""
    return _mlp(names, D, F, bias)


def _separate(config: MoEConfig, names: LayerNames, slot_of: Sequence[int]) -> Iterator[Entry]:
    D, F = config.hidden_size, config.intermediate_size
    for part in ("gate", "up"):
        for expert, slot in enumerate(slot_of):
            yield _gate_or_up(names.role("gate_up"), names.tensor(part, expert), part, D, F, (slot,))
    for expert, slot in enumerate(slot_of):
        yield linear(names.role("down"), names.tensor("down", expert), F, D, (slot,))


def _stacked(config: MoEConfig, names: LayerNames, experts: ExpertTensors, slot_of: Sequence[int]) -> Iterator[Entry]:
    D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
    if config.packed:
        yield from _packed(config, names, experts, slot_of)
    gate_up = (E, D, 2 * F) if experts.inputs_first else (E, 2 * F, D)
    down = (E, F, D) if experts.inputs_first else (E, D, F)
    for expert, slot in enumerate(slot_of):
        one = slice(expert, expert + 1)
        for which, part in enumerate(("gate", "up")):
            rows = experts.rows(part, F)
            dest = (slot, slice(0, D), which, slice(0, F))
            source = (one, slice(0, D), rows) if experts.inputs_first else (one, rows, slice(0, D))
            piece = Piece(dest, names.tensor("gate_up"), source, transpose=not experts.inputs_first)
            if not config.packed:
                yield names.role("gate_up"), piece, gate_up
            if config.bias:
                piece = Piece((slot, which, slice(0, F)), names.tensor("gate_up_bias"), (one, rows))
                yield names.role("gate_up_bias"), piece, (E, 2 * F)
    for expert, slot in enumerate(slot_of):
        one = slice(expert, expert + 1)
        source = (one, *whole(down[1:]))
        piece = Piece((slot, *whole((F, D))), names.tensor("down"), source, transpose=not experts.inputs_first)
        if not config.packed:
            yield names.role("down"), piece, down
        if config.bias:
            yield (
                names.role("down_bias"),
                Piece((slot, slice(0, D)), names.tensor("down_bias"), (one, slice(0, D))),
                (E, D),
            )


def _packed(config: MoEConfig, names: LayerNames, experts: ExpertTensors, slot_of: Sequence[int]) -> Iterator[Entry]:
    """MXFP4: bytes `[E, out, in/32, 16]` and scales `[E, out, in/32]`, whatever the order of unpacked experts."""
    D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
    for kind, tail in (("blocks", (BLOCK // 2,)), ("scales", ())):
        into, back = whole((D // BLOCK, *tail)), whole((F // BLOCK, *tail))
        for expert, slot in enumerate(slot_of):
            one = slice(expert, expert + 1)
            tensor = names.tensor("gate_up") + f"_{kind}"
            for which, part in enumerate(("gate", "up")):
                piece = Piece((slot, which, slice(0, F), *into), tensor, (one, experts.rows(part, F), *into))
                yield names.role(f"gate_up.{kind}"), piece, (E, 2 * F, D // BLOCK, *tail)
            tensor = names.tensor("down") + f"_{kind}"
            piece = Piece((slot, slice(0, D), *back), tensor, (one, slice(0, D), *back))
            yield names.role(f"down.{kind}"), piece, (E, D, F // BLOCK, *tail)


def _mlp(names: LayerNames, D: int, F: int, bias: bool, tensors: str = "", roles: str = "") -> Iterator[Entry]:
    """Gate and up, each in its tensor or one after the other in one, and down; biases are separate."""
    role = names.role(f"{roles}gate_up")
    for part in ("gate", "up"):
        if names.has(f"{tensors}gate_up"):
            dest = (slice(0, D), ("gate", "up").index(part), slice(0, F))
            source = (SEPARATE.rows(part, F), slice(0, D))
            yield role, Piece(dest, names.tensor(f"{tensors}gate_up"), source, transpose=True), (2 * F, D)
        else:
            yield _gate_or_up(role, names.tensor(f"{tensors}{part}"), part, D, F)
    yield linear(names.role(f"{roles}down"), names.tensor(f"{tensors}down"), F, D)
    if not bias:
        return
    for which, part in enumerate(("gate", "up")):
        piece = Piece((which, slice(0, F)), names.tensor(f"{tensors}{part}_bias"), whole((F,)))
        yield names.role(f"{roles}gate_up_bias"), piece, (F,)
    yield whole_tensor(names.role(f"{roles}down_bias"), names.tensor(f"{tensors}down_bias"), (D,))


def _gate_or_up(role: str, tensor: str, part: str, D: int, F: int, lead: tuple[int, ...] = ()) -> Entry:
    dest = (*lead, slice(0, D), ("gate", "up").index(part), slice(0, F))
    return role, Piece(dest, tensor, whole((F, D)), transpose=True), (F, D)
