"""Exit codes, one-line errors and the `moejax` entry point."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moejax.commands.common import add_mesh, add_model, add_strategy, base_parser, run
from moejax.commands.main import COMMANDS
from moejax.commands.main import main as moejax_main
from moejax.errors import MoejaxError

ROOT = Path(__file__).parents[1]


def parser() -> argparse.ArgumentParser:
    parser = base_parser("moejax sample", "Does nothing.", "moejax sample --json")
    add_model(parser)
    add_mesh(parser)
    add_strategy(parser)
    return parser


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def main(_: argparse.Namespace) -> int:
        raise error

    return main


def test_the_options_reach_main_and_its_exit_code_is_returned():
    seen: list[argparse.Namespace] = []
    argv = ["--tp-size", "8", "--ep-size", "4", "--json", "--dtype", "bfloat16", "--strategy", "all_reduce"]
    assert run(lambda args: seen.append(args) or 7, parser(), argv) == 7
    (args,) = seen
    assert (args.mesh, args.json, args.model, args.dtype) == ("ep=4,tp=2", True, "demo", "bfloat16")
    assert (args.strategy, args.platform, args.coordinator) == ("all_reduce", None, None)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--mesh", "ep=x"], 'error: mesh "ep=x": the size "x" of axis ep is not a whole number'),
        (["--num-processes", "2"], "error: --coordinator and --process-id missing: several processes need all of "),
        (["--platform", "gpu"], "error: argument --platform: invalid choice: 'gpu' (choose from "),
        (["--no-such"], "error: unrecognized arguments: --no-such (see moejax sample --help)"),
        (["--plat", "cpu"], "error: unrecognized arguments: --plat cpu (see moejax sample --help)"),
        (["--mesh"], "error: argument --mesh: expected one argument (see moejax sample --help)"),
        (["--tp-size", "0"], "error: argument --tp-size/--tp_size: '0' is not a whole number from 1"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(argv: list[str], line: str, capfd: pytest.CaptureFixture[str]):
    assert run(raising(AssertionError("main is not reached")), parser(), argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_users_mistake_is_folded_into_one_line(capsys: pytest.CaptureFixture[str]):
    assert run(raising(MoejaxError("a bad\n  config")), parser(), []) == 2
    assert capsys.readouterr().err == "error: a bad config\n"


def test_an_interrupt_leaves_no_traceback(capsys: pytest.CaptureFixture[str]):
    assert run(raising(KeyboardInterrupt()), parser(), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), parser(), [])


def test_help_ends_with_the_example(capsys: pytest.CaptureFixture[str]):
    assert run(raising(AssertionError("main is not reached")), parser(), ["--help"]) == 0
    assert capsys.readouterr().out.endswith("example:\n  moejax sample --json\n")


PROGRAM = """
import sys, time
from moejax.commands.common import base_parser, run

def main(args):
    print("ready", flush=True)
    for _ in range(100_000 if args.json else 1):
        print("a line of output")
    if not args.json:
        time.sleep(60)
    return 0

sys.exit(run(main, base_parser("program", "", ""), None))
"""


def start_program(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_a_reader_that_goes_away_is_no_error():
    with start_program("--json") as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("number", "code", "report"), [(signal.SIGINT, 130, b"interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, b"")]
)
def test_signals(number: signal.Signals, code: int, report: bytes):
    with start_program() as process:
        os.kill(process.pid, number)
        assert process.wait(timeout=60) == code
        assert process.stderr.read() == report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean generate? (see moejax --help)"),
        (["xyz"], f"unknown command 'xyz'; there are {', '.join(COMMANDS)} (see moejax --help)"),
        (["--mesh", "ep=2"], f"unknown option '--mesh'; there are {', '.join(COMMANDS)} (see moejax --help)"),
        ([], f"which command? one of {', '.join(COMMANDS)} (see moejax --help)"),
    ],
)
def test_the_entry_point_refuses_what_it_does_not_know(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert moejax_main(argv) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_entry_point_forwards_the_rest(monkeypatch: pytest.MonkeyPatch):
    class Verify:
        @staticmethod
        def main(argv: list[str]) -> int:
            return 5 if argv == ["--json", "x"] else 1

    monkeypatch.setitem(sys.modules, "moejax.commands.verify", Verify)
    assert moejax_main(["verify", "--json", "x"]) == 5


def test_the_entry_point_runs_as_a_module(run_cli):
    assert run_cli(["moejax", "--version"]).stdout.startswith("moejax ")
    done = run_cli(["moejax", "--help"])
    assert done.returncode == 0
    assert "  generate   continue prompts" in done.stdout
    assert "  verify     prove that" in done.stdout
