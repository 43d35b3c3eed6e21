"""The parts of a run, put together: data, step, state, checkpoints, sinks, evaluation."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from moejax import distributed
from moejax.benchmarks.training import step_flops
from moejax.benchmarks.work import Work
from moejax.data.encoder import DocumentEncoder
from moejax.data.pipeline import TrainingData
from moejax.errors import MoejaxError
from moejax.evaluation.evaluator import Evaluator
from moejax.evaluation.texts import read_texts
from moejax.language_model import role_of
from moejax.loading import DTYPES, abstract_decoder
from moejax.model import Decoder, Options, lay
from moejax.named_function import named_function
from moejax.run_checkpoints.checkpoints import Checkpoints
from moejax.training.gradients import Params, StepSettings
from moejax.training.loop import Loop, Progress, Watcher
from moejax.training.metrics import Record, eval_record
from moejax.training.optimizer import learning_rates, make_optimizer
from moejax.training.placing import Placing
from moejax.training.recipe import Recipe
from moejax.training.run_folder import RunFolder
from moejax.training.sinks import JsonLines, Sink, TensorBoard
from moejax.training.start import Start
from moejax.training.state import TrainState, decoder_of
from moejax.training.step import TrainStep

Bar = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]
"""Shows how far something is under a title; gives the callback (done, total)."""


@contextlib.contextmanager
def open_run(
    folder: RunFolder, recipe: Recipe, start: Start, mesh: Mesh, resume: int | None, watcher: Watcher, bar: Bar
) -> Iterator[Loop]:
    """A run, ready to take its next step; closed behind it, the last save finished.

    Every process of a launch calls it; process 0 writes.

    Args:
      folder: of the run.
      recipe: checked against `start`.
      start: the model, that of the folder where the run is continued.
      mesh: where it trains.
      resume: the saved step to continue from, or None for a run that begins.
      watcher: is told of each step.
      bar: for what takes long before the first step.

    Raises:
      MoejaxError: files that are missing or damaged, data or a saved state that are not this run's.
    """
    if resume is None and distributed.is_main():
        folder.write_model(start.raw_config, start.companions)
    distributed.barrier()
    with contextlib.ExitStack() as stack:
        encoder = DocumentEncoder.from_folder(folder.model)
        data = stack.enter_context(contextlib.closing(_data(recipe, encoder, folder.cache, bar)))
        step = _step(recipe, start, mesh)
        checkpoints = stack.enter_context(
            Checkpoints(
                folder.checkpoints, keep_last=recipe.checkpoint.keep_last, keep_best=recipe.checkpoint.keep_best
            )
        )
        progress = Progress()
        if resume is None:
            with bar("making the model") as tick:
                state = TrainState.of(start.parameters(mesh, recipe.seed, tick), step.optimizer, mesh, recipe.seed)
        else:
            like = TrainState.abstract(start.config, step.optimizer, mesh)
            state, position = checkpoints.restore(resume, like, start.config, mesh)
            if position is None:
                raise MoejaxError(f"{folder.checkpoints / str(resume)} has no place in the data; it was converted")
            data.restore(position["batches"])
            progress = Progress(**position["progress"])
        if distributed.is_main():
            folder.write_recipe(recipe)
        loop = Loop(
            recipe=recipe,
            step=step,
            state=state,
            batches=data,
            place=Placing(step.lie, recipe.accumulate),
            rates=learning_rates(recipe.optimizer, recipe.steps),
            save=functools.partial(checkpoints.save, config=start.config, mesh=mesh),
            evaluate=_evaluation(recipe, step, encoder),
            sinks=_sinks(folder, recipe, progress.step, stack) if distributed.is_main() else (),
            watcher=watcher,
            flops=step_flops(Work.of(start.config), recipe.data.batch, recipe.data.length),
            progress=progress,
        )
        yield loop


def find_files(recipe: Recipe) -> None:
    """Refuses a recipe whose files are not there, before anything is written."""
    paths = [*(part.path for part in recipe.data.mixture), *(recipe.eval.data if recipe.eval.every else ())]
    for path in map(recipe.data.find, paths):
        if not Path(path).expanduser().is_file():
            raise MoejaxError(
                f"there is no file {path}; the recipe's paths start at data.root, and that at the current folder: name "
                "another with --set data.root=FOLDER"
            )


def _data(recipe: Recipe, encoder: DocumentEncoder, cache: Path, bar: Bar) -> TrainingData:
    sources = [replace(part, path=recipe.data.find(part.path)) for part in recipe.data.mixture]
    with bar("reading the data") as tick:
        return TrainingData(
            sources,
            encoder,
            batch=recipe.data.batch,
            length=recipe.data.length,
            seed=recipe.seed,
            cache=cache,
            process_index=distributed.process_index(),
            process_count=distributed.process_count(),
            progress=tick,
        )


def _step(recipe: Recipe, start: Start, mesh: Mesh) -> TrainStep:
    lie = lay(recipe.data.batch // recipe.accumulate, mesh, Options())
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    settings = StepSettings(
        dtype=DTYPES[recipe.dtype],
        clip=recipe.optimizer.clip or None,
        losses=recipe.losses,
        remat=recipe.remat,
    )
    return TrainStep(start.config, lie, optimizer, settings)


def _sinks(folder: RunFolder, recipe: Recipe, after: int, stack: contextlib.ExitStack) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(folder.metrics, after)]
    if recipe.metrics.tensorboard:
        sinks.append(TensorBoard(folder.tensorboard, after))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


def _evaluation(
    recipe: Recipe, step: TrainStep, encoder: DocumentEncoder
) -> Callable[[TrainState], tuple[Record, float]] | None:
    if not recipe.eval.every:
        return None
    texts = read_texts([recipe.data.find(path) for path in recipe.eval.data], encoder, step.config)
    evaluator = Evaluator(_decoder(step), step.lie, recipe.data.batch // recipe.accumulate, recipe.data.length)

    def evaluate(state: TrainState) -> tuple[Record, float]:
        results = [evaluator(state.params, text) for text in texts]
        return eval_record(step.config, results), float(np.mean([result.loss for result in results]))

    return evaluate


def _decoder(step: TrainStep) -> Callable[[Params], Decoder]:
    """Makes a decoder of a run's parameters, in the dtype of its steps."""
    named, dtype = step.settings.losses.router, step.settings.dtype
    router = None if named is None else named_function(named, "losses.router")
    graph, leaves = abstract_decoder(step.config, step.lie.stream.mesh, dtype, router)
    paths = {role_of(path): path for path in leaves}

    def decoder(params: Params) -> Decoder:
        return decoder_of(graph, paths, {role: p.astype(dtype) for role, p in params.items()})

    return decoder
