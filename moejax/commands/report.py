"""`moejax report`: one page about a run, or about several side by side."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from moejax import distributed
from moejax.commands.common import base_parser, run
from moejax.commands.session import console, log
from moejax.errors import MoejaxError
from moejax.run_report.page import render
from moejax.run_report.reading import Run, read_runs
from moejax.run_report.tables import final_values


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_report, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax report",
        "Write one HTML page about a run of moejax train: its losses, in training and by domain, the optimizer and\n"
        "the speed, how full each expert was over time and by domain, and the routers' entropy. Several runs are\n"
        "compared: curves over each other, final values side by side, the fields in which their recipes differ. The\n"
        "page needs no network and no file beside it. A run that still goes on, or was killed, can be shown too.",
        "moejax report runs/demo --out demo.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a folder that moejax train was given as --run")
    parser.add_argument(
        "--out", default="report.html", metavar="PAGE", help="where to write it (default: report.html, here)"
    )
    return parser


def _report(args: argparse.Namespace) -> int:
    if not distributed.is_main():
        return 0
    out = Path(args.out).expanduser()
    _check_out(out)
    with console.status("reading"):
        runs = read_runs([Path(name).expanduser() for name in args.runs])
        _write(out, render(runs))
    for each in runs:
        if each.unreadable:
            log(f"left out  {each.unreadable} lines of {each.name} that were cut off")
    if args.json:
        print(json.dumps({"page": str(out), "runs": [_as_json(each) for each in runs]}))
    else:
        print(out)
    return 0


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise MoejaxError(f"--out {out} is a folder; name the page in it, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise MoejaxError(f"--out {out}: there is no folder {out.parent}")


def _write(out: Path, page: str) -> None:
    """The whole page or none of it, so that one that is open in a browser can be written anew."""
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MoejaxError(f"cannot write {out}: {error.strerror}") from error


def _as_json(each: Run) -> dict[str, Any]:
    return {"name": each.name, "final": {name: values[0] for name, values in final_values([each]).items()}}
