"""A compiled program read from its text, `Compiled.as_text()`: computations, and their instructions as scheduled."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_BITS = {"pred": 8, "token": 0}
"""Widths of the dtypes whose name has no number."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOPED = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_VIEWS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


@dataclass(frozen=True, slots=True)
class Buffer:
    """One array: dtype as HLO names it, and shape on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        number = re.search(r"\d+", self.dtype)
        return self.size * (int(number[0]) if number else _BITS[self.dtype]) // 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line.

    Attributes:
      result: the array it makes, or those of a tuple.
      operands: names of instructions of the same computation.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    result: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Of what it makes."""
        return sum(buffer.bytes for buffer in self.result)

    @property
    def scope(self) -> str:
        """The JAX names around it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        branches = (name for names in _BRANCHES.findall(self.attributes) for name in re.findall(r"[\w.\-]+", names))
        return (*_CALLED.findall(self.attributes), *branches)

    @property
    def target(self) -> str:
        """What a custom call calls; empty for any other instruction."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class Program:
    """Computations by name, their instructions in the order in which they are scheduled; `entry` is where it begins."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads the text of `Compiled.as_text()`."""
        computations: dict[str, list[Instruction]] = {}
        entry, lines = "", []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                lines = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
            elif lines is not None and (match := _NAME.match(line)):
                lines.append(_instruction(match[1], match[2]))
        return cls({name: tuple(lines) for name, lines in computations.items()}, entry)

    def instructions(self) -> Iterator[Instruction]:
        """All of all computations."""
        for lines in self.computations.values():
            yield from lines

    def reached(self, start: Iterable[str]) -> frozenset[str]:
        """The computations that those of `start` run, directly or not, and themselves."""
        reached, todo = set(), list(start)
        while todo:
            if (name := todo.pop()) not in reached:
                reached.add(name)
                todo += [called for line in self.computations[name] for called in line.called]
        return frozenset(reached)

    @property
    def looped(self) -> frozenset[str]:
        """The computations inside while loops."""
        return self.reached(name for line in self.instructions() for name in _LOOPED.findall(line.attributes))

    def kernels(self) -> Iterator[Instruction]:
        """The instructions that make buffers of their own: what is inside fusions does not, nor does a mere view."""
        inside = self.reached(
            name
            for line in self.instructions()
            if line.opcode not in {"while", "conditional", "call"} and not line.opcode.startswith("async")
            for name in line.called
        )
        for name, lines in self.computations.items():
            if name not in inside:
                yield from (line for line in lines if line.opcode not in _VIEWS and not line.opcode.endswith("-done"))


def _instruction(name: str, line: str) -> Instruction:
    """`line` is TYPE OPCODE(OPERANDS)ATTRIBUTES."""
    end = _closing(line, 0) if line.startswith("(") else line.index(" ")
    types, rest = line[:end], line[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return Instruction(name, rest[:opening], buffers(types), tuple(operands), rest[closing:])


def buffers(text: str) -> tuple[Buffer, ...]:
    """The arrays that a type in HLO's spelling lists."""
    return tuple(
        Buffer(dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in _ARRAY.findall(text)
    )


def _closing(text: str, opening: int) -> int:
    """One past the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    raise AssertionError(f"unbalanced: {text[:80]}")
