"""`moejax train`: train a model on a mesh, from random weights or a checkpoint's, and continue where a run stopped."""

import argparse
import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax import distributed
from moejax.commands.common import add_mesh, base_parser, run
from moejax.commands.session import LoadingBar, agree, console, log
from moejax.commands.train_progress import LiveProgress
from moejax.errors import MoejaxError
from moejax.language_model import LanguageModel
from moejax.mesh import make_mesh
from moejax.model import Decoder, Options
from moejax.start_report import training_lines
from moejax.training import tables
from moejax.training.assembly import find_files, open_run
from moejax.training.loop import DivergedError, Loop
from moejax.training.optimizer import make_optimizer
from moejax.training.overrides import overridden
from moejax.training.recipe import DTYPES, Recipe, make_recipe, read_recipe
from moejax.training.run_folder import RunFolder, changes, check_config
from moejax.training.start import Start
from moejax.training.state import TrainState
from moejax.training.stopping import CommonStop, StopRequest


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    That is 1 when the loss stayed non-finite, and 130 or 143 when a signal ended the run, which is saved then.
    """
    return run(_train, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax train",
        "Train a model as a recipe says: from the random weights of a config, or from the weights of a Hugging Face\n"
        "folder, router and experts included. Every mesh computes the same steps.\n\n"
        "Ctrl-C and SIGTERM save at the end of the running step and end the run (exit code 130 or 143); a second\n"
        "one ends it at once. A run that was stopped or killed goes on from its last save with --resume, on any mesh.",
        "moejax train --config configs/train/smoke.toml --data README.md --run /tmp/run --mesh ep=4,tp=2",
    )
    parser.add_argument("--config", metavar="RECIPE", help="a TOML file, such as configs/train/demo.toml")
    parser.add_argument("--run", required=True, metavar="DIR", help="the run's folder: checkpoints, metrics, model")
    add_mesh(parser)
    parser.add_argument(
        "--steps", type=_count, metavar="N", help="stop after step N; the schedule is still that of the recipe's steps"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last save in DIR, or begin if there is none"
    )
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="train on these files instead of the recipe's mixture"
    )
    parser.add_argument(
        "--model", metavar="M", help="train this model from its weights, with its tokenizer: a folder, hub id, demo"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the forward and backward pass, over float32 weights")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field of the recipe, such as optimizer.lr=3e-4; repeatable",
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    # Orbax warns there of every save that has no score.
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = RunFolder(Path(args.run).expanduser())
    recipe, resume = _recipe(args, folder)
    start = Start.of(recipe.model) if resume is None else Start.of_run(folder.model)
    start.check(recipe)
    find_files(recipe)
    config = json.dumps(start.raw_config, sort_keys=True)
    agree(args, {"recipe": tables.write(recipe), "config": config, "saved step": str(resume)})
    mesh = make_mesh(args.mesh, num_experts=start.config.num_experts, platform=args.platform)
    until = args.steps or recipe.steps
    if resume is not None and resume >= until:
        log(f"the run in {folder.path} is at step {resume} already; --steps N takes it further")
        return 0
    for line in _report(start, recipe, mesh):
        log(line)
    live = LiveProgress(console, (resume or 0) + 1, until)
    with open_run(folder, recipe, start, mesh, resume, live, LoadingBar) as loop:
        try:
            with live, StopRequest() as request:
                number = loop.run(until, CommonStop(request))
        except DivergedError as error:
            log(f"error: {error}; the last save is from before that: lower optimizer.lr or clip, and resume")
            return 1
    _tell(args, folder, loop, live, number)
    return 0 if number is None else 128 + number


def _recipe(args: argparse.Namespace, folder: RunFolder) -> tuple[Recipe, int | None]:
    """The recipe with what the command line changes, and the saved step that the run continues from."""
    if not args.resume:
        folder.check_fresh()
    resume = folder.last_save() if args.resume else None
    if args.resume and resume is None:
        log(f"resuming  {folder.path} has no save yet: the run begins")
    if args.config is None and not folder.holds_run:
        raise MoejaxError("--config is missing: name a recipe, such as configs/train/demo.toml")
    raw = read_recipe(folder.recipe if args.config is None else Path(args.config).expanduser())
    recipe = make_recipe(overridden(_with_options(raw, args), args.set))
    if resume is not None:
        log(f"resuming  {folder.path} after step {resume}")
        for name, (was, now) in changes(folder.read_recipe(), recipe).items():
            log(f"changed   {name} from {was} to {now}")
        if recipe.model.config and Path(recipe.model.config).expanduser().exists():
            check_config(folder.model, Start.of(recipe.model).raw_config)
    return recipe, resume


def _with_options(raw: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The tables with what --model, --data and --dtype replace."""
    if args.model:
        raw = raw | {"model": {"path": args.model}}
    if args.data and isinstance(data := raw.get("data", {}), dict):
        raw = raw | {"data": data | {"mixture": [{"path": os.path.abspath(path)} for path in args.data]}}
    return raw | ({"dtype": args.dtype} if args.dtype else {})


def _report(start: Start, recipe: Recipe, mesh: Mesh) -> list[str]:
    config = start.config
    decoder = nnx.eval_shape(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0)))
    model = LanguageModel(config, decoder, mesh, Options(), start.tokenizer_folder, start.raw_config, {}, None)
    state = TrainState.abstract(config, make_optimizer(recipe.optimizer, recipe.steps), mesh)
    return training_lines(model, recipe.data.batch, recipe.accumulate, _by_role(state))


def _by_role(state: TrainState) -> Iterator[tuple[str, Any]]:
    """What a state has of each parameter; counters, which are of none, are left out."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if isinstance(path[-1], jax.tree_util.DictKey):
            yield path[-1].key, leaf


def _tell(args: argparse.Namespace, folder: RunFolder, loop: Loop, live: LiveProgress, number: int | None) -> None:
    """The end of a run, on stdout."""
    record, progress = loop.last, loop.progress
    result = {
        "run": str(folder.path),
        "checkpoint": str(folder.checkpoints / str(progress.step)),
        "step": progress.step,
        "loss": record.get("loss"),
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        "tokens_per_s": live.targets / live.seconds if live.seconds else None,
        "mesh": dict(loop.step.lie.stream.mesh.shape),
        "dtype": loop.recipe.dtype,
        "eval": {name: value for name, value in record.items() if name.startswith("eval/") and "load" not in name},
        "stopped_by": None if number is None else signal.Signals(number).name,
    }
    if args.json:
        print(json.dumps(result))
    elif distributed.is_main():
        stopped = f", stopped by {result['stopped_by']}" if number is not None else ""
        print(f"step {progress.step}, loss {record.get('loss', math.nan):.4f}{stopped}: {result['checkpoint']}")
