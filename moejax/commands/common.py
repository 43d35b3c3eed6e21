"""What all command lines share: the parser, the common options, and how errors become one line and an exit code."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from moejax import compat, distributed, mesh
from moejax.commands.kept_programs import keep_programs
from moejax.errors import MoejaxError

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STRATEGIES = ("auto", "all_to_all", "all_reduce")
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message)} (see {self.prog} --help)\n")


def base_parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser with the options of every command; `example` is a command line that runs as it stands."""
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--platform", choices=PLATFORMS, help="devices to run on (default: what JAX finds)")
    group = parser.add_argument_group("several processes (SLURM, Open MPI and Kubernetes need none of these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--dtype` and `--dequantise`."""
    add_source(parser)
    add_dequantise(parser)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--dtype`."""
    parser.add_argument(
        "--model", default="demo", metavar="M", help='a folder, a hub id "org/name[@revision]" or "demo" (default)'
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the parameters and activations (default: the checkpoint's)"
    )


def add_dequantise(parser: argparse.ArgumentParser) -> None:
    """Adds `--dequantise`."""
    parser.add_argument(
        "--dequantise",
        action="store_true",
        help="unpack MXFP4 experts while loading: faster to compute with, 3.8 times their memory in bfloat16",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds `--mesh` and other runtimes' spellings of it; `run` leaves their sum in `args.mesh`."""
    parser.add_argument("--mesh", metavar="ep=A,tp=B", help="devices along each axis (default: all devices)")
    compat.add_compat_flags(parser)


def add_strategy(parser: argparse.ArgumentParser) -> None:
    """Adds `--strategy`."""
    parser.add_argument(
        "--strategy", default="auto", choices=STRATEGIES, help="how tokens reach their experts (default: auto)"
    )


def run(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parses `argv`, joins the other processes, calls `main` and returns the exit code.

    In a launch of several processes `sys.stdout` is the real stdout on process 0 and nowhere on the others.

    Returns:
        What `main` returns; 2 for a user's mistake, 130 when interrupted, 141 when stdout's reader has gone. Any other
        exception keeps its traceback (and ends a process of several at once, so that its peers do not wait for it).
    """
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        _enter(args)
        code = main(args)
        sys.stdout.flush()
        distributed.finish()
    except MoejaxError as error:
        reason = _one_line(str(error))
        return _failed(2, f"error: {reason}", reason)
    except KeyboardInterrupt:
        code = _failed(INTERRUPTED, "interrupted", "interrupted")
        if argv is None:
            leave(code)
        return code
    except BrokenPipeError:
        # What is still buffered would raise again at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        distributed.fail(141, "nobody reads its output any more")
        return 141
    except Exception as error:
        if distributed.process_count() > 1:
            return _failed(1, traceback.format_exc(), _one_line(f"{type(error).__name__}: {error}"))
        raise
    return code


def leave(code: int) -> NoReturn:
    """Ends an interrupted process at once: after an interrupted compilation JAX crashes at the interpreter's exit."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _enter(args: argparse.Namespace) -> None:
    """The platform, kept programs, the mesh and the launch: all of it before a JAX backend starts."""
    if args.platform:
        jax.config.update("jax_platforms", args.platform)
    keep_programs()
    if "mesh" in args:
        args.mesh = compat.translate(args)
        if args.mesh is not None:
            args.mesh = str(mesh.parse_mesh(args.mesh))
    distributed.start(args.coordinator, args.num_processes, args.process_id)
    if distributed.process_count() > 1:
        results = distributed.quiet_stdout()
        sys.stdout = results if distributed.is_main() else open(os.devnull, "w")


def _failed(code: int, report: str, reason: str) -> int:
    print(report, file=sys.stderr, flush=True)
    distributed.fail(code, reason)
    return code


def _one_line(message: str) -> str:
    return " ".join(message.split())
