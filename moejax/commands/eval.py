"""`moejax eval`: how well a model predicts files, and which experts their tokens go to."""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moejax import distributed
from moejax.checkpoint.source import read_json
from moejax.commands.common import add_mesh, add_model, add_strategy, base_parser, run
from moejax.commands.session import agree_on, console, load_model, log, mesh_for
from moejax.config import ModelConfig
from moejax.data.encoder import DocumentEncoder
from moejax.evaluation.evaluator import BATCH, Evaluator, evaluator_of
from moejax.evaluation.results import Result, together
from moejax.evaluation.texts import LENGTH, Text, read_texts, row_length
from moejax.families import read_config
from moejax.language_model import LanguageModel
from moejax.model import lay
from moejax.run_report.domains import check_figure, write_figure
from moejax.start_report import report_lines


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_eval, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax eval",
        "Loss (mean nats a target), perplexity, bits per byte and experts' load, by file and in all.\n\n"
        "Documents are packed into rows of --length tokens, each after the token that begins a document. Every token\n"
        "but a document's first is predicted once, the one that ends the document too, from the tokens of its\n"
        "document before it in the row: what goes on in the next row starts anew there. Bits per byte are all nats,\n"
        "those of the ends included, over ln 2 and the UTF-8 bytes of the text. Of conversations (JSONL with\n"
        "messages) the answers alone count.\n\n"
        "The second table names for each layer the expert that most tokens chose, and how many times the mean it got.",
        "moejax eval --model demo --data README.md --platform cpu",
    )
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="files: text or .jsonl, also with .xz or .gz behind"
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help=f"tokens of a row (default {LENGTH}, or the model's context if less)"
    )
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"rows at a time (default {BATCH})")
    add_mesh(parser)
    add_strategy(parser)
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the experts' load by file")
    return parser


def _eval(args: argparse.Namespace) -> int:
    check_figure(args.plot)
    folder = agree_on(args, alone=("plot",))
    config = read_config(read_json(folder, "config.json"))
    length = row_length(config, args.length)
    with console.status("reading"):
        texts = read_texts(args.data, DocumentEncoder.from_folder(folder), config)
    mesh = mesh_for(args, folder)
    model, _ = load_model(args, folder, mesh, strategy=args.strategy)
    evaluator, params = evaluator_of(model, length, args.batch)
    for line in report_lines(model, args.batch):
        log(line)
    began = time.perf_counter()
    results = _run(evaluator, params, texts)
    result = _result(args, model, length, results) | {"seconds": time.perf_counter() - began}
    if args.plot and distributed.is_main():
        write_figure(result, args.plot)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    elif distributed.is_main():
        for table in (_losses(results), _loads(results, config)):
            Console().print(table)
    return 0


def _run(evaluator: Evaluator, params: Any, texts: Sequence[Text]) -> list[Result]:
    """All files, under one bar on stderr."""
    shown = console.is_terminal and distributed.is_main()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=sum(map(evaluator.batches, texts)))
        results = []
        for text in texts:
            progress.update(task, description=text.name)
            results.append(evaluator(params, text, lambda: progress.advance(task)))
    return results


def _result(args: argparse.Namespace, model: LanguageModel, length: int, results: Sequence[Result]) -> dict[str, Any]:
    """The command's JSON."""
    config = model.config
    files = zip(args.data, results, strict=True)
    return {
        "model": args.model,
        "mesh": {axis: model.mesh.shape[axis] for axis in ("ep", "tp")},
        "strategy": lay(args.batch, model.mesh, model.options).choice.strategy,
        "dtype": next(iter(model.parameters().values())).dtype.name,
        "length": length,
        "batch": args.batch,
        "layers": list(config.sparse),
        "files": [{"path": path} | result.as_json(config) for path, result in files],
        "all": together(results).as_json(config),
        "bits_per_byte": {result.name: result.as_json(config)["bits_per_byte"] for result in results},
    }


def _losses(results: Sequence[Result]) -> Table:
    table = _table("file", "loss", "perplexity", "bits/byte", "targets", "bytes")
    for result in (*results, *([together(results)] if len(results) > 1 else [])):
        table.add_row(
            result.name,
            f"{result.loss:.4f}",
            f"{result.perplexity:.4g}",
            f"{result.bits_per_byte:.4f}",
            f"{result.targets:,}",
            f"{result.bytes:,}",
        )
    return table


def _loads(results: Sequence[Result], config: ModelConfig) -> Table:
    """For each layer and file the fullest expert, and its load over the mean."""
    table = _table("layer", *(result.name for result in results))
    table.title, table.title_justify = "fullest expert, and its load over the mean", "left"
    fullest = [result.load.argmax(1) for result in results]
    ratios = [result.max_over_mean(config) for result in results]
    for row, layer in enumerate(config.sparse):
        table.add_row(str(layer), *(f"#{e[row]} {r[row]:.2f}x" for e, r in zip(fullest, ratios, strict=True)))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
