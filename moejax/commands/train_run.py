"""What `moejax train` does: it settles the recipe, opens the run, takes its steps and tells how it ended."""

import argparse
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax import distributed
from moejax.commands.session import LoadingBar, agree, console, log
from moejax.commands.train_progress import LiveProgress
from moejax.errors import MoejaxError
from moejax.language_model import LanguageModel
from moejax.mesh import make_mesh
from moejax.model import Decoder, Options
from moejax.start_report import training_lines
from moejax.training import tables
from moejax.training.assembly import find_files, open_run
from moejax.training.loop import DivergedError
from moejax.training.optimizer import make_optimizer
from moejax.training.overrides import overridden
from moejax.training.recipe import Recipe, make_recipe, read_recipe
from moejax.training.run_folder import RunFolder, changes, check_config
from moejax.training.sinks import read_records
from moejax.training.start import Start
from moejax.training.state import TrainState
from moejax.training.stopping import CommonStop, StopRequest


def train(args: argparse.Namespace) -> int:
    """The run that the command line asks for, and its exit code; see `moejax.commands.train`."""
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
        _tell(args, folder, resume, {"mesh": dict(mesh.shape), "dtype": recipe.dtype})
        return 0
    for line in _report(start, recipe, mesh):
        log(line)
    if until > recipe.steps:
        log(f"schedule  of {recipe.steps} steps, after which the learning rate stays; --set steps={until} stretches it")
    live = LiveProgress(console, (resume or 0) + 1, until)
    with open_run(folder, recipe, start, mesh, resume, live, LoadingBar) as loop:
        try:
            with live, StopRequest() as request:
                number = loop.run(until, CommonStop(request))
        except DivergedError as error:
            log(f"error: {error}; go back to the last save with --resume, with a lower optimizer.lr or optimizer.clip")
            return 1
    found = {
        "mesh": dict(mesh.shape),
        "dtype": recipe.dtype,
        "tokens_per_s": live.targets / live.seconds if live.seconds else None,
        "stopped_by": None if number is None else signal.Signals(number).name,
    }
    _tell(args, folder, loop.progress.step, found)
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
    """The tables with what --model, --data and --dtype replace.

    The recipe's evaluation rests with its mixture: its files are of the same corpus, and may not be here.
    """
    if args.model:
        raw = raw | {"model": {"path": args.model}}
    if args.data and isinstance(data := raw.get("data", {}), dict):
        raw = raw | {"data": data | {"mixture": [{"path": os.path.abspath(path)} for path in args.data]}}
        if isinstance(evaluation := raw.get("eval"), dict) and evaluation.get("every"):
            raw = raw | {"eval": evaluation | {"every": 0}}
            log("data      --data replaces the recipe's, so that nothing is evaluated but with --set eval.every=N")
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


def _tell(args: argparse.Namespace, folder: RunFolder, step: int, found: dict[str, Any]) -> None:
    """Where the run stands, on stdout."""
    if not distributed.is_main():
        return
    record = next(reversed(read_records(folder.metrics)), {}) if folder.metrics.exists() else {}
    result = {
        "run": str(folder.path),
        "checkpoint": str(folder.checkpoints / str(step)),
        "step": step,
        **{name: record.get(name) for name in ("loss", "tokens", "skipped")},
        **found,
        "eval": {name: value for name, value in record.items() if name.startswith("eval/") and "load" not in name},
    }
    if args.json:
        print(json.dumps(result))
    else:
        loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
        stopped = f", stopped by {found['stopped_by']}" if found.get("stopped_by") else ""
        print(f"step {step}{loss}{stopped}: {result['checkpoint']}")
