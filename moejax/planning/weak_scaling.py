"""Does a layer scale? Its program for ever more H100s, none of which is there, with the work of each device fixed:

    python -m moejax.planning.weak_scaling configs/models/deepseek-v3/config.json --plot assets/weak_scaling.svg

Fixed are the tokens of a device and the experts of the layer, so that each device has as many rows to multiply on
average, and ever fewer weights to hold. Needs JAX's CUDA plugin, and matplotlib for the plot.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from moejax.benchmarks.plot import Panel, check_plot, draw
from moejax.config import MoEConfig
from moejax.errors import MoejaxError
from moejax.families import read_config
from moejax.model import Options
from moejax.planning.collectives import collectives
from moejax.planning.flops import dot_flops, grouped_flops
from moejax.planning.hlo import Program
from moejax.planning.programs import compile_layer
from moejax.planning.topologies import h100_mesh

TP, MOST = 8, 32
"""Devices along tp, and the most along ep."""
TOKENS = 1024
"""Of one device."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one device of a mesh does and holds, by the compiled program, in the one wave of balanced routing.

    Attributes:
      flops: of all products, with as many rows for each device's experts as come on average.
      most_flops: were all rows of the exchange's cells filled.
      ep_bytes, tp_bytes: operands of the collectives over each axis.
      temporaries: bytes.
      arguments: bytes of weights and tokens.
    """

    devices: int
    flops: int
    most_flops: int
    ep_bytes: int
    tp_bytes: int
    temporaries: int
    arguments: int


def measure(config: MoEConfig, mesh: Mesh) -> Cost:
    """Compiles the layer under `all_to_all` with TOKENS tokens a device."""
    ep = mesh.shape["ep"]
    compiled = compile_layer(config, mesh, tokens=TOKENS * ep, options=Options(strategy="all_to_all"))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    program = Program.parse(text)
    once = [collective for collective in collectives(text, mesh) if not collective.loop]
    return Cost(
        devices=mesh.size,
        flops=dot_flops(program) + grouped_flops(program, TOKENS * config.num_experts_per_tok),
        most_flops=dot_flops(program) + grouped_flops(program),
        ep_bytes=sum(collective.bytes for collective in once if "ep" in collective.axes),
        tp_bytes=sum(collective.bytes for collective in once if collective.axes == ("tp",)),
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
    )


def table(costs: Sequence[Cost]) -> str:
    """The costs in Markdown."""
    rows = [
        "| ep | devices | GFLOP | GFLOP, cells full | MB over ep | MB over tp | temporaries, MB | arguments, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        sizes = (cost.ep_bytes, cost.tp_bytes, cost.temporaries, cost.arguments)
        numbers = [flops / 1e9 for flops in (cost.flops, cost.most_flops)] + [size / 1e6 for size in sizes]
        rows.append(f"| {cost.devices // TP} | {cost.devices} | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
    return "\n".join(rows)


def panels(costs: Sequence[Cost]) -> list[Panel]:
    """The costs over the number of devices."""

    def panel(title: str, unit: str, **lines: str) -> Panel:
        result = Panel(title, "devices", unit)
        for name, label in lines.items():
            values = ((cost.devices, float(getattr(cost, name))) for cost in costs)
            result.lines[label] = [(x, y, y, y) for x, y in values if y]
        return result

    return [
        panel("computed by a device", "FLOP", flops="even routing", most_flops="cells full"),
        panel("moved by a device", "bytes", ep_bytes="over ep", tp_bytes="over tp"),
        panel("held by a device", "bytes", temporaries="temporaries", arguments="weights and tokens"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit code 2 with one line where something is missing."""
    parser = argparse.ArgumentParser(prog="moejax.planning.weak_scaling", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="a model's config.json; its last layer is compiled")
    parser.add_argument("--plot", metavar="FILE", help="also as a picture, .svg or .png")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator need start
    try:
        check_plot(arguments.plot)
        config = read_config(json.loads(arguments.config.read_text(encoding="utf-8"))).layers[-1].moe
        if config is None:
            raise MoejaxError(f"the last layer of {arguments.config} has no experts")
        sizes = [1 << power for power in range(MOST.bit_length())]
        costs = [measure(config, h100_mesh(f"ep={ep},tp={TP}")) for ep in sizes]
    except (MoejaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(costs))
    if arguments.plot:
        draw(panels(costs), arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
