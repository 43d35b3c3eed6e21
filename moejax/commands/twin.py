"""`moejax twin`: a tiny random checkpoint that takes every special path of a published model's config."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moejax import distributed
from moejax.checkpoint.source import read_json, resolve
from moejax.commands.common import base_parser, run
from moejax.commands.session import log
from moejax.families import text_config
from moejax.start_report import human_bytes
from moejax.twins.shrink import shrink
from moejax.twins.writing import NAMED, Written, write_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_twin, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax twin",
        "Write a tiny checkpoint of random weights in the family of a published model, in the hub's format. It keeps\n"
        "whatever the config switches on: expert groups, shared experts, kinds of rope, the pattern of layers, packed\n"
        "weights. For tests, and for reports of a mistake that a large model shows. It has no tokenizer: generate\n"
        "from --prompt-ids.",
        "moejax twin demo /tmp/twin",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help='a config.json, a folder with one, a hub id "org/name[@revision]" or "demo"'
    )
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default 0)")
    parser.add_argument("--dtype", default="float32", choices=NAMED, help="of the weights (default float32)")
    return parser


def _twin(args: argparse.Namespace) -> int:
    if not distributed.is_main():
        return 0
    raw = _config(args.config)
    small = shrink(raw)
    written = write_checkpoint(Path(args.out), small, args.seed, args.dtype)
    _tell(raw, small)
    if args.json:
        print(json.dumps(_as_json(written)))
    else:
        log(f"{written.parameters:,} parameters, {human_bytes(written.bytes)}")
        print(written.folder)
    return 0


def _config(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    folder, file = (path.parent, path.name) if path.is_file() else (resolve(name), "config.json")
    return read_json(folder, file)


def _tell(raw: Mapping[str, Any], small: Mapping[str, Any]) -> None:
    """On stderr, the fields that changed and what became of them."""
    before, after = text_config(raw), text_config(small)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("field", "before", "after"):
        table.add_column(title, no_wrap=True)
    for name, value in after.items():
        if value != before.get(name) and not name.endswith("dtype"):
            table.add_row(name, _brief(before.get(name)), _brief(value))
    Console(stderr=True).print(table)


def _brief(value: Any) -> str:
    """A value in a table's cell; of a long list its length, of an object what it holds of sizes."""
    if value is None:
        return "-"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    text = json.dumps(value)
    return text if len(text) <= 30 else text[:27] + "..."


def _as_json(written: Written) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "model_type": written.config.model_type,
        "parameters": written.parameters,
        "bytes": written.bytes,
    }
