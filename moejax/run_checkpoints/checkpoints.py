"""The checkpoints that a run keeps: written while it goes on, whole or not at all."""

import contextlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.run_checkpoints.neutral import NeutralForm
from moejax.run_checkpoints.sealing import SealedSave, SealingHandler, told
from moejax.run_checkpoints.stored import STATE, StoredState


class Checkpoints:
    """A folder of checkpoints, one for each step that was saved; `moejax.run_checkpoints.stored` says what is in one.

    Use as a context manager, or call `close`. With several processes every one of them makes the same calls. One run
    at a time writes to a folder: to open it removes what an interrupted save left.
    """

    def __init__(self, folder: Path, *, keep_last: int = 1, keep_best: int = 0):
        """
        Args:
          folder: made if it is not there.
          keep_last: how many of the newest to keep.
          keep_best: how many of those with the lowest scores to keep besides.

        Raises:
          MoejaxError: a number that makes no sense, or a folder that cannot be used.
        """
        if keep_last < 1 or keep_best < 0:
            raise MoejaxError(
                f"keep_last={keep_last} must be at least 1, and keep_best={keep_best} at least 0: a run resumes from "
                "the newest checkpoint"
            )
        self.folder = folder
        kept = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep_last), _Lowest(keep_best)])
        options = ocp.CheckpointManagerOptions(preservation_policy=kept, best_fn=_score, best_mode="min")
        with self._told():
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                for unfinished in ocp.utils.tmp_checkpoints(folder):
                    shutil.rmtree(unfinished.get())
            self._manager = ocp.CheckpointManager(
                folder.absolute(), options=options, item_handlers={STATE: SealingHandler()}
            )
        self._forms: dict[Any, NeutralForm] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        config: ModelConfig,
        mesh: Mesh,
        *,
        data_state: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Saves a step. Returns when the state is copied, and may be consumed; files are written meanwhile.

        Waits for the save before this one, if that is not finished.

        Args:
          step: steps taken.
          state: with `params`, role -> array, and any more; see `NeutralForm`.
          config: the model's.
          mesh: where the state lies.
          data_state: the data's position, as JSON has it.
          score: the lower the better; without one, or where it is not finite, the step is not among the best.

        Raises:
          MoejaxError: the step is there already, or this save or the one before it cannot be written.
        """
        arrays = self._form(state, config, mesh).of(state)
        comparable = score is not None and math.isfinite(score)
        with self._told():
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                raise MoejaxError(f"{self.folder / str(step)} is there already; move it away to save this step again")
            self._manager.save(
                step,
                args=ocp.args.Composite(**{STATE: SealedSave(arrays, data=data_state)}),
                metrics={"score": float(score) if comparable else None},
                force=True,
            )

    def latest(self) -> int | None:
        """The newest step that is saved, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any, config: ModelConfig, mesh: Mesh) -> tuple[Any, Mapping[str, Any] | None]:
        """Reads a step, each device its part.

        Args:
          step: one that is saved.
          like: the state's shapes, dtypes and shardings, on this mesh; that it was saved from may have been another.
          config: the model's.
          mesh: where the state is to lie.

        Returns:
          The state, to the bit as it was saved, and the data's position.

        Raises:
          MoejaxError: no such step, damaged files, or arrays of another model or optimizer.
        """
        form = self._form(like, config, mesh)
        stored = StoredState.open(self.folder / str(step))
        stored.check(form.abstract)
        return form.state(stored.read(form.abstract)), stored.data

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          MoejaxError: the last save could not be written.
        """
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        with self._told():
            self._manager.close()

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return told(f"cannot keep checkpoints in {self.folder}")

    def _form(self, like: Any, config: ModelConfig, mesh: Mesh) -> NeutralForm:
        """Worked out once; a run asks for one only."""
        leaves, tree = jax.tree.flatten(like)
        key = (config, mesh, tree, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
        if key not in self._forms:
            self._forms = {key: NeutralForm(config, mesh, like)}
        return self._forms[key]


@dataclass
class _Lowest(checkpoint_managers.PreservationPolicy):
    """Keeps the `n` checkpoints with the lowest scores; orbax' own would keep those without one among them."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scored = [info for info in checkpoints if info.metrics and _score(info.metrics) < math.inf]
        best = sorted(scored, key=lambda info: _score(info.metrics))[: self.n]
        return [info in best for info in checkpoints]


def _score(metrics: Mapping[str, float | None]) -> float:
    score = metrics["score"]
    return math.inf if score is None else score
