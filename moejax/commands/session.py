"""What commands that run a model share: agreeing between processes, loading with a progress bar, logging."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moejax import distributed
from moejax.checkpoint.source import read_json, resolve
from moejax.families import read_config, unknown_fields
from moejax.language_model import LanguageModel
from moejax.loading import load
from moejax.mesh import make_mesh

console = Console(stderr=True)


def log(line: str) -> None:
    """One line on stderr, from process 0 alone."""
    if distributed.is_main():
        print(line, file=sys.stderr, flush=True)


def agree_on(args: argparse.Namespace, alone: Sequence[str] = ()) -> Path:
    """Finds the model's folder and makes sure that every process of the launch is about to do the same.

    Args:
      args: the command line; its options must be the same on every process.
      alone: names of the options that only process 0 reads.

    Raises:
      MoejaxError: on every process, naming what differs.
    """
    folder = resolve(args.model)
    agree(args, {"config": json.dumps(read_json(folder, "config.json"), sort_keys=True)}, alone)
    return folder


def agree(args: argparse.Namespace, texts: Mapping[str, str], alone: Sequence[str] = ()) -> None:
    """Makes sure that every process of the launch is about to do the same.

    Args:
      args: the command line; its options must be the same on every process.
      texts: what else must be, by name; they are compared by their hashes.
      alone: names of the options that only process 0 reads.

    Raises:
      MoejaxError: on every process, naming what differs.
    """
    distributed.agree(
        {
            "code": distributed.code_hash(),
            "jax": jax.__version__,
            **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()},
            **{
                f"--{name.replace('_', '-')}": str(value)
                for name, value in vars(args).items()
                if name not in ("process_id", *alone)
            },
        }
    )


def load_model(args: argparse.Namespace, folder: Path, mesh: Mesh, **options: object) -> tuple[LanguageModel, float]:
    """The model, and the seconds it took; says which config fields are not understood, and what was left out."""
    began = time.perf_counter()
    if ignored := unknown_fields(read_json(folder, "config.json")):
        log(f"warning: config.json has fields that moejax does not know and ignores: {', '.join(ignored)}")
    with LoadingBar(f"loading {args.model}") as progress:
        model = load(folder, mesh=mesh, dtype=args.dtype, packed=not args.dequantise, progress=progress, **options)  # type: ignore[arg-type]
    say_left_out(model)
    return model, time.perf_counter() - began


def say_left_out(model: LanguageModel) -> None:
    """Names what of the checkpoint is not of the decoder, where anything is not."""
    if model.left_out:
        log(f"left out  {', '.join(model.left_out)}: not part of the text decoder")


def mesh_for(args: argparse.Namespace, folder: Path) -> Mesh:
    """The mesh asked for, or the default one for this model's experts."""
    experts = read_config(read_json(folder, "config.json")).num_experts
    return make_mesh(args.mesh, num_experts=experts, platform=args.platform)


class LoadingBar:
    """A progress bar on stderr, where that is a terminal; gives the callback that moves it."""

    def __init__(self, title: str):
        shown = console.is_terminal and distributed.is_main()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._progress.__enter__()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
