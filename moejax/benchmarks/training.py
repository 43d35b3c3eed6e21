"""Training steps of one batch, by moejax and by its peers, as contenders that take turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.benchmarks.interleave import Spread, interleave
from moejax.benchmarks.peers import Child
from moejax.benchmarks.work import Work
from moejax.language_model import LanguageModel
from moejax.model import lay

LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Stepped:
    """One training step: its seconds, and the loss before it."""

    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Trained:
    """One contender over the rounds; `losses` are those of all its steps in order, that of the warm-up first."""

    seconds: Spread
    losses: list[float]


def step_flops(work: Work, batch: int, length: int) -> float:
    """FLOPs of a step: three times those of the forward pass, of which the head of every token is a part here.

    What a recomputing backward pass adds counts as overhead, not as work.
    """
    config = work.config
    head = 2 * config.vocab_size * config.hidden_size * (length - 1)
    return 3 * batch * (work.prefill_flops(length) + head)


def random_rows(vocabulary: int, batch: int, length: int) -> list[list[int]]:
    """Ids drawn evenly from the vocabulary, the same in every run."""
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length)).tolist()


def own_contender(model: LanguageModel, rows: Sequence[Sequence[int]], dtype: str) -> Callable[[], Stepped]:
    """Steps of AdamW on one batch over and over, in `dtype` over f32 master weights, which are the model's own."""
    import optax  # of the train extra

    from moejax.training.batch import NO_TARGET, Batch
    from moejax.training.gradients import StepSettings
    from moejax.training.state import TrainState
    from moejax.training.step import TrainStep

    lie = lay(len(rows), model.mesh, model.options)
    tokens = np.asarray(rows, np.int32)
    shape, last = tokens.shape, np.full((len(rows), 1), NO_TARGET, np.int32)
    arrays = (
        tokens,
        np.concatenate([tokens[:, 1:], last], 1),
        np.ones(shape, np.int32),
        np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    )
    batch = jax.tree.map(lambda a: a[None], Batch(*(model.put_rows(a, lie) for a in arrays)))
    optimizer = optax.adamw(LEARNING_RATE)
    take = TrainStep(model.config, lie, optimizer, StepSettings(dtype=jnp.dtype(dtype)))
    state: Any = TrainState.of(model.parameters(), optimizer, model.mesh)

    def run() -> Stepped:
        nonlocal state
        began = time.perf_counter()
        state, metrics = take(state, batch)
        jax.block_until_ready(state)
        return Stepped(time.perf_counter() - began, float(metrics.loss))

    return run


def peer_contender(child: Child, experts: str, rows: Sequence[Sequence[int]], dtype: str) -> Callable[[], Stepped]:
    """The same through transformers with one of its implementations of the experts."""

    def run() -> Stepped:
        child.ask("choose", experts=experts)
        return Stepped(**child.ask("train_step", rows=rows, dtype=dtype, learning_rate=LEARNING_RATE))

    return run


def measure(
    contenders: dict[str, Callable[[], Stepped]], rounds: int, tick: Callable[[str, int], None]
) -> dict[str, Trained]:
    """The figures of each contender; all take turns in every round."""
    warm: dict[str, list[float]] = {name: [] for name in contenders}

    def noted(name: str, run: Callable[[], Stepped]) -> Callable[[], Stepped]:
        def step() -> Stepped:
            stepped = run()
            warm[name].append(stepped.loss)
            return stepped

        return step

    results = interleave({name: noted(name, run) for name, run in contenders.items()}, rounds, tick)
    return {name: Trained(Spread.of([r.seconds for r in runs]), warm[name]) for name, runs in results.items()}
