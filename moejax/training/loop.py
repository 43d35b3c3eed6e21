"""The loop of a run: a batch, a step, its record; now and then an evaluation and a save."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from moejax import distributed
from moejax.training.batch import Batch
from moejax.training.metrics import Record, router_record
from moejax.training.recipe import Recipe
from moejax.training.sinks import Sink
from moejax.training.state import TrainState
from moejax.training.step import StepMetrics, TrainStep
from moejax.training.stopping import CommonStop


class DivergedError(Exception):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Batches(Iterator[Batch], Protocol):
    """This process' rows of one batch after another, and where in the data the next one is, as JSON."""

    def state(self) -> dict[str, Any]: ...


class Saves(Protocol):
    """Keeps a state under its step; returns when the state may be consumed."""

    def __call__(
        self, step: int, state: TrainState, /, *, data_state: Mapping[str, Any], score: float | None
    ) -> None: ...


class Watcher(Protocol):
    """Is told what happens."""

    def record(self, record: Record) -> None: ...

    def warn(self, text: str) -> None: ...


@dataclass
class Progress:
    """How far a run is; what of it the state on the devices does not know.

    Attributes:
      step: the last one that was taken.
      tokens: targets learned.
      skipped: steps without an update, for want of a finite loss or gradient.
      skipped_in_row: how many of them were the last ones.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass
class Loop:
    """Takes steps until the last or until it is asked to stop.

    While a step runs on the devices, the host draws the next batch and reads the results of the step before.

    Attributes:
      recipe: of the run.
      step: compiled.
      state: consumed by each step and replaced.
      batches: where the run's progress says.
      place: puts a batch on the mesh.
      rates: the learning rate by the updates made before; the last one stays.
      save: see `Saves`.
      evaluate: by state, the part of a record that an evaluation gives, and its score (the lower the better).
      sinks: of this process.
      watcher: live progress.
      flops: of one step, for the MFU.
      progress: how far the run is.
    """

    recipe: Recipe
    step: TrainStep
    state: TrainState
    batches: Batches
    place: Callable[[Batch], Batch]
    rates: np.ndarray
    save: Saves
    evaluate: Callable[[TrainState], tuple[Record, float]] | None
    sinks: Sequence[Sink]
    watcher: Watcher
    flops: float
    progress: Progress = field(default_factory=Progress)
    _saved: int = 0
    _clock: float = 0.0

    def run(self, until: int, stop: CommonStop) -> int | None:
        """Steps up to and with `until`, of which the last is saved.

        Returns:
          The signal that ended the run before, or None.

        Raises:
          DivergedError: `optimizer.max_skipped` steps in a row had no finite loss or gradient. The state is not saved.
        """
        self._saved, self._clock = self.progress.step, time.perf_counter()
        running: tuple[int, StepMetrics] | None = None
        number = None
        for step in range(self.progress.step + 1, until + 1):
            if (number := stop.after(step)) is not None:
                break
            self.state, metrics = self.step(self.state, self.place(next(self.batches)))
            if running:
                self._write(self._read(*running))
            running = step, metrics
            evaluates, saves = self._due(step, until)
            if evaluates or saves:
                self._pause(self._read(*running), evaluates, saves)
                running = None
        if running:
            self._write(self._read(*running))
            self._save(None)
        return number

    def _due(self, step: int, until: int) -> tuple[bool, bool]:
        """Whether an evaluation, and whether a save, follow a step."""
        every = self.recipe.eval.every
        evaluates = self.evaluate is not None and every > 0 and (step == until or step % every == 0)
        return evaluates, step == until or step % self.recipe.checkpoint.every == 0

    def _pause(self, record: Record, evaluates: bool, saves: bool) -> None:
        """What is done after a step before the next one begins."""
        score = None
        if evaluates:
            assert self.evaluate is not None
            found, score = self.evaluate(self.state)
            record |= found
        self._write(record)
        if saves:
            self._save(score)
        self._clock = time.perf_counter()

    def _save(self, score: float | None) -> None:
        """The records up to this step are written before, so that what is resumed has them."""
        if self._saved < self.progress.step:
            position = {"batches": self.batches.state(), "progress": asdict(self.progress)}
            self.save(self.progress.step, self.state, data_state=position, score=score)
            self._saved = self.progress.step

    def _read(self, step: int, metrics: StepMetrics) -> Record:
        """Waits for a step's results, and counts them."""
        m: Any = jax.tree.map(distributed.replicated_to_host, metrics)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        progress = self.progress
        rate = self.rates[min(step - 1 - progress.skipped, len(self.rates) - 1)]
        progress.step = step
        progress.tokens += int(m.targets)
        if m.finite:
            progress.skipped_in_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_row += 1
        record: Record = {
            "step": step,
            "loss": float(m.loss),
            "tokens_per_s": int(m.targets) / seconds,
            "tokens": progress.tokens,
            "seconds": seconds,
            "learning_rate": float(rate),
            "grad_norm": float(m.grad_norm),
            "balance_loss": float(m.balance_loss),
            "z_loss": float(m.z_loss),
            "dropped": int(m.dropped),
            "skipped": progress.skipped,
        }
        if peak := self.recipe.metrics.peak_flops:
            record["mfu"] = self.flops / seconds / peak
        if not m.finite:
            record["bad_layer"] = int(m.bad_layer)
        record |= router_record(self.step.config, m.tokens_per_expert, m.router_entropy)
        return record

    def _write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)
        self.watcher.record(record)
        if "bad_layer" in record:
            self._warn(record["step"], record["bad_layer"])

    def _warn(self, step: int, layer: int) -> None:
        where = f"layer {layer}" if layer >= 0 else "no layer, but beside them"
        count, limit = self.progress.skipped_in_row, self.recipe.optimizer.max_skipped
        what = f"step {step}: the loss or a gradient is not finite, first in {where}"
        if count >= limit:
            raise DivergedError(f"{what}, and it is so for {count} steps in a row")
        self.watcher.warn(f"{what}; its update is skipped ({count} of {limit} in a row)")
