"""What a GPU's schedule hides behind computation: a collective that was started, until it is waited for."""

from dataclasses import dataclass

from moejax.planning.collectives import kind_of
from moejax.planning.hlo import Instruction, Program


@dataclass(frozen=True, slots=True)
class Flight:
    """A collective from its start to its end.

    Attributes:
      asynchronous: it runs beside what is scheduled between; otherwise the device waits at the start.
      between: the instructions scheduled while it is under way.
    """

    start: Instruction
    asynchronous: bool
    between: tuple[Instruction, ...]

    def hides_behind(self, scope: str) -> bool:
        """Whether kernels of a JAX scope such as "experts" run meanwhile that multiply matrices."""
        return self.asynchronous and any(_multiplies(line) and scope in line.scope.split("/") for line in self.between)


def flights(program: Program, kind: str) -> list[Flight]:
    """The collectives of a kind that a computation starts and ends, in the order of their starts."""
    found = []
    for lines in program.computations.values():
        for begin, start in enumerate(lines):
            if kind_of(start) == kind and start.opcode.endswith("-start"):
                end = next(i for i, line in enumerate(lines) if start.name in line.operands)
                asynchronous = '"is_sync":false' in start.attributes
                found.append(Flight(start, asynchronous, lines[begin + 1 : end]))
    return found


def _multiplies(line: Instruction) -> bool:
    """A matrix product, a kernel of ours, or a loop of them; not a fusion that only moves or adds."""
    return line.opcode in ("custom-call", "while") or (line.opcode == "fusion" and "gemm" in line.name)
