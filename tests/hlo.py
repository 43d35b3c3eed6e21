"""The collectives of a compiled program, read from its text."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
COLLECTIVE = re.compile(rf"^(?:\(.*?\)|\S+) ({KINDS})(?:-start)?\(([^)]*)\)(.*)$")
CALLED = re.compile(r"(?:to_apply|calls|body|condition|branch_computations|(?:true|false)_computation)=\{?([^,}\s]+)")
LOOPED = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
ITEM_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: as HLO names it.
      axes: the mesh axes that its groups run over, in the mesh's order.
      operands: (dtype, shape) of each, as HLO names them.
      loop: whether it is in the body (or the condition) of a while loop.
      scope: the JAX names around it.
    """

    kind: str
    axes: tuple[str, ...]
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    loop: bool
    scope: str

    @property
    def bytes(self) -> int:
        """Of the operands on one device."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.operands)

    @property
    def dtype(self) -> str:
        (dtype,) = {dtype for dtype, _ in self.operands}
        return dtype

    def brief(self) -> tuple[str, str, str, int]:
        """Kind, axes, dtype and bytes."""
        return self.kind, "+".join(self.axes), self.dtype, self.bytes


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a program compiled for `mesh`; `text` is that of `Compiled.as_text()`."""
    computations = _computations(text)
    loops = _reached(
        [name for lines in computations.values() for line in lines for name in LOOPED.findall(line)], computations
    )
    found = []
    for name, lines in computations.items():
        types = {m[1]: m[2] for m in map(INSTRUCTION.match, lines) if m}
        for line in types.values():
            if match := COLLECTIVE.match(line):
                kind, operands, rest = match.groups()
                arrays = [_array(part.strip(), types) for part in operands.split("%") if part.strip()]
                scope = re.search(r'op_name="([^"]*)"', rest)
                found.append(
                    Collective(kind, _axes(rest, mesh), tuple(arrays), name in loops, scope[1] if scope else "")
                )
    assert len(found) == len(re.findall(rf" (?:{KINDS})(?:-start)?\(", text)), "a collective was not understood"
    return found


def _computations(text: str) -> dict[str, list[str]]:
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            computations[match[2]] = lines = []
        elif line.startswith(" "):
            lines.append(line)
    return computations


def _reached(start: Iterable[str], computations: dict[str, list[str]]) -> set[str]:
    """The computations that are called from those of `start`, directly or not, and those themselves."""
    reached, todo = set(), list(start)
    while todo:
        if (name := todo.pop()) not in reached:
            reached.add(name)
            todo += [called.lstrip("%") for line in computations[name] for called in CALLED.findall(line)]
    return reached


def _array(operand: str, types: dict[str, str]) -> tuple[str, tuple[int, ...]]:
    dtype, shape = ARRAY.match(types[operand.rstrip(", ")]).groups()
    return dtype, tuple(int(size) for size in shape.split(",") if size)


def _axes(attributes: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes of replica groups, in any of the spellings: by axes of a mesh, as lists of ids, or as an iota."""
    groups = _groups(attributes, mesh.size)
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    for count in range(len(mesh.axis_names) + 1):
        for axes in itertools.combinations(range(ids.ndim), count):
            width = math.prod(ids.shape[axis] for axis in axes)
            if {
                frozenset(row) for row in np.moveaxis(ids, axes, range(-count, 0)).reshape(-1, width).tolist()
            } == groups:
                return tuple(mesh.axis_names[axis] for axis in axes)
    raise AssertionError(f"groups of no mesh axes: {attributes}")


def _groups(attributes: str, devices: int) -> set[frozenset[int]]:
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        # Not always by the program's own names: axes that the compiler made up are called axis_0 and so on.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = np.arange(devices).reshape([int(size) for size in sizes.values()])
        across = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[2])]
        rows = np.moveaxis(ids, across, range(-len(across), 0))
        return {frozenset(row) for row in rows.reshape(-1, math.prod(ids.shape[axis] for axis in across)).tolist()}
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, reshape, transpose = ([int(i) for i in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(reshape)).reshape(reshape)
        ids = ids.transpose(transpose) if transpose else ids
        return {frozenset(row) for row in ids.reshape(shape).tolist()}
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    rows = re.findall(r"\{([\d,]+)\}", lists[1])
    return {frozenset(map(int, row.split(","))) for row in rows} or {frozenset(range(devices))}
