"""The building blocks of a plan: entries that say which part of which tensor fills which part of which parameter.

Checkpoints hold linear weights as [out, in]; moejax holds them as [in, out], with heads on an axis of their own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moejax.checkpoint.pieces import Piece, whole

Entry = tuple[str, Piece, tuple[int, ...]]
"""Role, piece, and the shape that the piece's tensor has as a whole."""


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Roles and tensor names of one part of one layer, such as `attention` of layer 3."""

    names: Mapping[str, str]
    layer: int
    part: str

    def role(self, name: str) -> str:
        return f"layers.{self.layer}.{self.part}.{name}"

    def tensor(self, name: str, expert: int = 0) -> str:
        return self.names[f"layers.{{l}}.{self.part}.{name}"].format(l=self.layer, e=expert)

    def has(self, name: str) -> bool:
        """Whether the family stores this under a name of its own."""
        return f"layers.{{l}}.{self.part}.{name}" in self.names


def whole_tensor(role: str, tensor: str, shape: tuple[int, ...]) -> Entry:
    """A parameter that is a tensor as it stands."""
    return role, Piece(whole(shape), tensor, whole(shape)), shape


def linear(role: str, tensor: str, inputs: int, outputs: int, lead: tuple[int, ...] = ()) -> Entry:
    """A matrix [in, out] (at index `lead` of its parameter) from a tensor [out, in]."""
    shape = (outputs, inputs)
    return role, Piece((*lead, *whole((inputs, outputs))), tensor, whole(shape), transpose=True), shape


def held(stored: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(where it is stored, head of the checkpoint) for every stored head that is not padding."""
    return ((at, head) for at, head in enumerate(stored) if head >= 0)


@dataclass(frozen=True, slots=True)
class Heads:
    """A parameter's heads in a tensor whose rows are `total` heads of `width`, each the rows from `first` to
    `first + size` of its head.

    `stored` gives the checkpoint's head in each place, -1 for padding.
    """

    stored: tuple[int, ...]
    total: int
    width: int
    first: int = 0
    size: int | None = None

    @property
    def own(self) -> int:
        return self.width if self.size is None else self.size

    def rows(self, head: int) -> slice:
        start = head * self.width + self.first
        return slice(start, start + self.own)

    def project(self, role: str, tensor: str, inputs: int) -> Iterator[Entry]:
        """`[D, heads, own]` from `[total * width, D]`."""
        for at, head in held(self.stored):
            dest = (slice(0, inputs), at, slice(0, self.own))
            piece = Piece(dest, tensor, (self.rows(head), slice(0, inputs)), transpose=True)
            yield role, piece, (self.total * self.width, inputs)

    def project_back(self, role: str, tensor: str, outputs: int) -> Iterator[Entry]:
        """`[heads, own, D]` from `[D, total * width]`."""
        for at, head in held(self.stored):
            dest = (at, slice(0, self.own), slice(0, outputs))
            piece = Piece(dest, tensor, (slice(0, outputs), self.rows(head)), transpose=True)
            yield role, piece, (outputs, self.total * self.width)

    def vectors(self, role: str, tensor: str) -> Iterator[Entry]:
        """`[heads, own]` from `[total * width]`."""
        for at, head in held(self.stored):
            yield role, Piece((at, slice(0, self.own)), tensor, (self.rows(head),)), (self.total * self.width,)

    def scalars(self, role: str, tensor: str) -> Iterator[Entry]:
        """`[heads]` from `[total]`."""
        for at, head in held(self.stored):
            yield role, Piece((slice(at, at + 1),), tensor, (slice(head, head + 1),)), (self.total,)
