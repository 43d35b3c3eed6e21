"""`moejax bench`: how fast a model, a block, collectives and loading are, against transformers and the machine."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from moejax import distributed
from moejax.benchmarks.peers import cpus, load_average
from moejax.benchmarks.plot import check_plot, draw, panels_of
from moejax.commands.bench_runs import run_collectives, run_generation, run_layer, run_load, run_train
from moejax.commands.bench_tables import table_of
from moejax.commands.common import (
    INTERRUPTED,
    STRATEGIES,
    add_mesh,
    add_model,
    add_source,
    add_strategy,
    base_parser,
    leave,
    run,
)
from moejax.commands.session import log
from moejax.errors import MoejaxError

ROUNDS = 5

_HOW = (
    "Contenders take turns in every round, A B A B ..., after one round that is left out; so is compilation. Figures\n"
    "are medians over the rounds; after ± stands half the distance between the quartiles.\n"
)
_LIMITS = (
    "prefill/s, decode/s  tokens a second\n"
    "peak  FLOPs of the prompts, counted from the config, over what the fastest product does, probed each round\n"
    "read  bytes of weights that a step needs, over what the fastest read of memory gets, probed each round\n"
)
_BUSY = (
    "warning: others keep this machine busy (load {load:.1f} on {cores} cores). That slows contenders unequally, torch "
    "most, whose threads spin while they wait for each other: measure when it is quiet, or set OMP_WAIT_POLICY=passive"
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One subcommand: a line of help, its parser, and what measures."""

    help: str
    parser: Callable[[], argparse.ArgumentParser]
    measure: Callable[[argparse.Namespace], dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in BENCHMARKS:
        benchmark = BENCHMARKS[given[0]]
        code = run(lambda args: _bench(given[0], benchmark, args), benchmark.parser(), given[1:])
    else:
        code = run(_no_benchmark, _parser(), given)
    if argv is None and code == INTERRUPTED:
        leave(code)
    return code


def _bench(name: str, benchmark: Benchmark, args: argparse.Namespace) -> int:
    if distributed.process_count() > 1:
        raise MoejaxError("bench measures a single process; leave out --coordinator, --num-processes and --process-id")
    if args.rounds < 1:
        raise MoejaxError(f"--rounds {args.rounds} must be at least 1")
    check_plot(args.plot)
    if (load := load_average()) > cpus() / 2:
        log(_BUSY.format(load=load, cores=cpus()))
    result = {"benchmark": name, **benchmark.measure(args)}
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _show(result)
    if args.plot:
        draw(panels_of(result), args.plot)
    return 0


def _show(result: Mapping[str, Any]) -> None:
    console = Console()
    for part in table_of(result):
        console.print(part)


def _no_benchmark(args: argparse.Namespace) -> int:
    kinds = ", ".join(BENCHMARKS)
    asked = f"there is no benchmark '{args.benchmark}'" if args.benchmark else "which benchmark is not said"
    raise MoejaxError(f"{asked}; begin with one of {kinds} (see moejax bench --help)")


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax bench",
        "Measure. The first word says what; `moejax bench WORD --help` says more.\n\n"
        + "\n".join(f"{name:12}{benchmark.help}" for name, benchmark in BENCHMARKS.items()),
        "moejax bench latency --platform cpu --output-len 8 --rounds 3",
    )
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="what to measure")
    return parser


def _generation(name: str, about: str, example: str) -> argparse.ArgumentParser:
    parser = base_parser(f"moejax bench {name}", f"{about}\n\n{_HOW}\n{_LIMITS}", example)
    _add_common(parser)
    add_model(parser)
    _add_config(parser)
    add_mesh(parser)
    add_strategy(parser)
    _add_versus(parser, "; on a mesh of N CPU devices its expert parallelism in N processes")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens of each prompt (default 128)")
    parser.add_argument("--output-len", type=int, default=32, metavar="N", help="new tokens of each (default 32)")
    return parser


def _latency() -> argparse.ArgumentParser:
    parser = _generation(
        "latency",
        "Time to first token (TTFT) and time per output token (TPOT) of one batch.",
        "moejax bench latency --platform cpu --input-len 64 --output-len 8 --rounds 3",
    )
    parser.add_argument("--batch-size", type=int, nargs=1, default=[1], metavar="N", help="prompts (default 1)")
    return parser


def _throughput() -> argparse.ArgumentParser:
    parser = _generation(
        "throughput",
        "Tokens a second in prefill, in decode and in all, for several batch sizes.",
        "moejax bench throughput --platform cpu --batch-size 1 4 --input-len 64 --output-len 8 --rounds 3",
    )
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="prompts at once (default 1 8 32)"
    )
    return parser


def _layer() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax bench layer",
        f"The forward pass of one mixture-of-experts block with random weights.\n\n{_HOW}",
        "moejax bench layer --platform cpu --tokens 8 64 --meshes ep=1,tp=1 ep=4,tp=2 --rounds 3",
    )
    _add_common(parser)
    add_source(parser)
    _add_config(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 1024], metavar="T", help="of one pass")
    parser.add_argument("--meshes", nargs="+", metavar="ep=A,tp=B", help="default: one mesh of all devices")
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=["auto"], help="that take turns (default: auto)"
    )
    return parser


def _collectives() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax bench collectives",
        f"all_to_all and psum of f32 over the axes of a mesh. A rate is each device's bytes over the time.\n\n{_HOW}",
        "moejax bench collectives --platform cpu --mesh ep=4,tp=2 --sizes 16384 1048576 --rounds 3",
    )
    _add_common(parser)
    add_mesh(parser)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1 << 14, 1 << 18, 1 << 22],
        metavar="BYTES",
        help="on each device (default 16384 262144 4194304)",
    )
    return parser


def _load() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax bench load",
        "Load a checkpoint into CPU memory, each time in a fresh process: seconds without imports, the most memory\n"
        "(mapped files counted), and what loading added to it over the bytes of the weights files. The round that is\n"
        "left out puts the files into the system's page cache for everyone.\n\n" + _HOW,
        "moejax bench load --model demo --rounds 2",
    )
    _add_common(parser)
    add_model(parser)
    _add_config(parser)
    add_mesh(parser)
    _add_versus(parser, " in one process")
    return parser


def _train() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax bench train",
        "Steps of AdamW on one batch of random tokens: forward and backward in --dtype, master weights in float32.\n"
        f"Memory is the most that the process held, loading included.\n\n{_HOW}",
        "moejax bench train --platform cpu --batch-size 2 --seq-len 32 --rounds 2",
    )
    _add_common(parser)
    add_model(parser)
    _add_config(parser)
    add_mesh(parser)
    add_strategy(parser)
    _add_versus(parser, " in one process (CPU)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens of each (default 256)")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"measured (default {ROUNDS})")
    parser.add_argument("--plot", metavar="FILE", help="write a picture too, FILE.png or FILE.svg")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="a config.json: random weights of that shape instead of a model's"
    )


def _add_versus(parser: argparse.ArgumentParser, how: str) -> None:
    parser.add_argument("--vs", choices=("transformers",), help=f"let the installed transformers take turns{how}")


BENCHMARKS = {
    "latency": Benchmark("time to first token and per token of one batch", _latency, run_generation),
    "throughput": Benchmark("tokens a second for several batch sizes", _throughput, run_generation),
    "layer": Benchmark("one mixture-of-experts block on meshes, with strategies", _layer, run_layer),
    "train": Benchmark("training steps", _train, run_train),
    "collectives": Benchmark("all_to_all and psum on a mesh", _collectives, run_collectives),
    "load": Benchmark("loading a checkpoint: time and memory", _load, run_load),
}
