"""The correspondence between sharded parameters and the tensors of a checkpoint, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

Window = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One rectangular part of a parameter and where it lies in a checkpoint tensor.

    Attributes:
        dest: index into the parameter; an int selects one index and drops that axis, slices have explicit start and
            stop.
        tensor: name of the checkpoint tensor.
        source: region of that tensor, explicit start and stop on every axis, and a step where a parameter takes every
            other row. Where the tensor has more axes than `dest` has slices, the others are of extent 1 in the region
            and are dropped.
        dropped: the axes that are; the leading ones if none is named.
        transpose: the region, transposed (2-D), is the destination.
    """

    dest: tuple[int | slice, ...]
    tensor: str
    source: Window
    transpose: bool = False
    dropped: tuple[int, ...] = ()

    @property
    def box(self) -> Window:
        """`dest` with slices of extent 1 in place of ints."""
        return tuple(index if isinstance(index, slice) else slice(index, index + 1) for index in self.dest)

    @property
    def axes(self) -> list[tuple[int, int]]:
        """Pairs (axis of the parameter, axis of the tensor) that correspond."""
        kept = [axis for axis, index in enumerate(self.dest) if isinstance(index, slice)]
        source = [axis for axis in range(len(self.source)) if axis not in self.lost]
        return list(zip(kept, reversed(source) if self.transpose else source, strict=True))

    @property
    def lost(self) -> tuple[int, ...]:
        """`dropped`, worked out where none is named."""
        kept = sum(isinstance(index, slice) for index in self.dest)
        return self.dropped or tuple(range(len(self.source) - kept))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole model's correspondence. Regions of a parameter that no piece covers are zeros (padding).

    Attributes:
        pieces: for each role (dotted path of a parameter), the parts it is made of.
        shapes: for each checkpoint tensor, the shape that it must have.
        packed: the tensors that must be bytes, blocks or scales of packed weights.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    packed: frozenset[str] = frozenset()


def within(piece: Piece, window: Window) -> Piece | None:
    """The part of `piece` inside a window of its parameter, `dest` counted from the window's corner; None if
    outside."""
    box = _intersect(piece.box, window)
    if box is None:
        return None
    source = list(piece.source)
    for axis, source_axis in piece.axes:
        whole_axis, step = piece.source[source_axis], step_of(piece.source[source_axis])
        start = whole_axis.start + (box[axis].start - piece.box[axis].start) * step
        length = box[axis].stop - box[axis].start
        source[source_axis] = slice(start, start + (length - 1) * step + 1, whole_axis.step)
    moved = (_shift(part, -edge.start) for part, edge in zip(box, window, strict=True))
    dest = tuple(new.start if isinstance(old, int) else new for old, new in zip(piece.dest, moved, strict=True))
    return replace(piece, dest=dest, source=tuple(source))


def within_source(piece: Piece, block: Window) -> Piece | None:
    """The part of `piece` inside a block of its tensor, `source` counted from the block's corner; None if outside."""
    parts = [_part(axis, bounds) for axis, bounds in zip(piece.source, block, strict=True)]
    if any(count <= 0 for _, count in parts):
        return None
    dest = list(piece.dest)
    for axis, source_axis in piece.axes:
        skipped, count = parts[source_axis]
        start = piece.box[axis].start + skipped
        dest[axis] = slice(start, start + count)
    source = []
    for axis, bounds, (skipped, count) in zip(piece.source, block, parts, strict=True):
        step = step_of(axis)
        start = axis.start + skipped * step - bounds.start
        source.append(slice(start, start + (count - 1) * step + 1, axis.step))
    return replace(piece, dest=tuple(dest), source=tuple(source))


def hull(regions: list[Window]) -> Window:
    """The smallest region that contains all of `regions`."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*regions, strict=True))


def whole(shape: tuple[int, ...]) -> Window:
    return tuple(slice(0, extent) for extent in shape)


def extents(window: Window) -> tuple[int, ...]:
    return tuple(len(range(part.start, part.stop, step_of(part))) for part in window)


def step_of(part: slice) -> int:
    return part.step or 1


def _part(axis: slice, bounds: slice) -> tuple[int, int]:
    """How many of a stepped range's indices lie before some bounds, and how many within them."""
    before, until = (
        len(range(axis.start, max(axis.start, min(edge, axis.stop)), step_of(axis)))
        for edge in (bounds.start, bounds.stop)
    )
    return before, until - before


def _intersect(a: Window, b: Window) -> Window | None:
    common = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return common if all(part.start < part.stop for part in common) else None


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
