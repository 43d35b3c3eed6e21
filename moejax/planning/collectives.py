"""The collectives of a compiled program: what travels over which axis of the mesh."""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from moejax.planning.hlo import Buffer, Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: as HLO names it.
      axes: the mesh axes that its groups run over, in the mesh's order.
      operands: what one device puts in.
      loop: whether it is in the body (or the condition) of a while loop.
      scope: the JAX names around it.
    """

    kind: str
    axes: tuple[str, ...]
    operands: tuple[Buffer, ...]
    loop: bool
    scope: str

    @property
    def bytes(self) -> int:
        """Of the operands on one device."""
        return sum(operand.bytes for operand in self.operands)

    @property
    def dtype(self) -> str:
        (dtype,) = {operand.dtype for operand in self.operands}
        return dtype

    def brief(self) -> tuple[str, str, str, int]:
        """Kind, axes, dtype and bytes."""
        return self.kind, "+".join(self.axes), self.dtype, self.bytes


def kind_of(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction is, or starts; None for all else."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a program compiled for `mesh`; `text` is that of `Compiled.as_text()`."""
    program = Program.parse(text)
    looped, found = program.looped, []
    for name, lines in program.computations.items():
        made = {line.name: line.result for line in lines}
        for line in lines:
            if kind := kind_of(line):
                operands = tuple(buffer for operand in line.operands for buffer in made[operand])
                found.append(Collective(kind, _axes(line.attributes, mesh), operands, name in looped, line.scope))
    return found


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
    if named := _NAMED.search(attributes):
        # Not always by the program's own names: axes that the compiler made up are called axis_0 and so on.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        ids = _iota(named[2] or str(devices), named[3]).reshape([int(size) for size in sizes.values()])
        across = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[4])]
        rows = np.moveaxis(ids, across, range(-len(across), 0))
        return {frozenset(row) for row in rows.reshape(-1, math.prod(ids.shape[axis] for axis in across)).tolist()}
    if iota := _IOTA.search(attributes):
        return {frozenset(row) for row in _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()}
    lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    assert lists is not None, attributes
    rows = re.findall(r"\{([\d,]+)\}", lists[1])
    return {frozenset(_numbers(row)) for row in rows} or {frozenset(range(devices))}


_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _iota(shape: str, transpose: str | None) -> np.ndarray:
    """0, 1, 2, ... in a shape, its axes reordered."""
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(transpose)) if transpose else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
