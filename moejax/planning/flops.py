"""Floating-point operations of the matrix products in a compiled program, on one device."""

import math
import re

from moejax.planning.hlo import Instruction, Program


def dot_flops(program: Program) -> int:
    """2 x multiply-adds of every `dot`, loops by their trip count where the compiler knows it and once where not."""
    return _flops(program, program.entry)


def _flops(program: Program, computation: str) -> int:
    lines = program.computations[computation]
    made = {line.name: line for line in lines}
    total = 0
    for line in lines:
        if line.opcode == "dot":
            total += _of_dot(line, made[line.operands[0]])
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.attributes)
        total += sum(_flops(program, name) for name in line.called) * (int(trips[1]) if trips else 1)
    return total


def _of_dot(line: Instruction, left: Instruction) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    assert found is not None, line
    contracted = math.prod(left.result[0].shape[int(axis)] for axis in found[1].split(",") if axis)
    return 2 * line.result[0].size * contracted


def grouped_flops(program: Program, rows: int | None = None) -> int:
    """Those of our kernels for grouped products `x[M, K] w[G, K, N]`, of the first wave alone.

    Args:
      rows: how many of the M are there; None: all.
    """
    total, lines = 0, program.computations[program.entry]
    made = {line.name: line.result for line in lines}
    for line in lines:
        if line.opcode == "custom-call":  # the one that looks up tiles has no weights
            for weights in (made[name][0].shape for name in line.operands if len(made[name][0].shape) == 3):
                total += 2 * (rows or line.result[0].shape[0]) * math.prod(weights[1:])
    return total
