"""`moejax tokenizer`: a byte-level BPE tokenizer learned from files of text or conversations."""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moejax import distributed
from moejax.commands.common import base_parser, run
from moejax.commands.session import LoadingBar, console
from moejax.data.bpe import Counted, count_tokens, refuse_existing, train_bpe, write_tokenizer
from moejax.inference.tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_tokenizer, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax tokenizer",
        "Learn a byte-level BPE tokenizer and write it as transformers reads it. Any text has tokens and is had back\n"
        "from them; <|endoftext|>, id 0, begins and ends documents. A file counts as much as it is long.",
        "moejax tokenizer --data README.md --vocab-size 512 --out /tmp/tokenizer",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help='text, whose documents end with a line <|endoftext|>, or *.jsonl with "text" or "messages"; also .xz, .gz',
    )
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="number of tokens (default 4096)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="one that has no tokenizer yet")
    return parser


def _tokenizer(args: argparse.Namespace) -> int:
    if not distributed.is_main():
        return 0
    folder = Path(args.out).expanduser()
    refuse_existing(folder)
    backend = train_bpe(args.data, args.vocab_size, bars=console.is_terminal)
    counted = _count(Tokenizer(backend, {}), args.data)
    write_tokenizer(backend, folder)
    if args.json:
        files = [
            {"path": c.path, "bytes": c.bytes, "tokens": c.tokens, "bytes_per_token": c.bytes_per_token}
            for c in counted
        ]
        print(json.dumps({"folder": str(folder), "vocab_size": backend.get_vocab_size(), "files": files}))
    else:
        _tell(counted, backend.get_vocab_size())
        print(folder)
    return 0


def _count(tokenizer: Tokenizer, paths: Sequence[str]) -> list[Counted]:
    counted = []
    for path in paths:
        size = Path(path).expanduser().stat().st_size
        with LoadingBar(f"counting {path}") as progress:
            counted.append(count_tokens(tokenizer, path, functools.partial(_move, progress, size)))
    return counted


def _move(progress: Callable[[int, int], None], size: int, read: int) -> None:
    progress(read, size)


def _tell(counted: Sequence[Counted], vocab_size: int) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold")
    for title in ("bytes", "tokens", "bytes per token"):
        table.add_column(title, justify="right")
    for file in counted:
        table.add_row(file.path, f"{file.bytes:,}", f"{file.tokens:,}", f"{file.bytes_per_token:.2f}")
    console.print(table)
    console.print(f"{vocab_size:,} tokens")
