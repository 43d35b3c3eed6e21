"""What a training run is, as data: a TOML file, read into frozen dataclasses that check their values."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.data.sources import Source
from moejax.errors import MoejaxError
from moejax.moe.losses import LossSettings
from moejax.training import tables


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """Which model is trained. One of `config` and `path` is given, the other is empty.

    Attributes:
      config: path of a config.json; the weights are random.
      path: a folder, a hub id or "demo", trained from the weights it has.
      tokenizer: where the tokenizer is, as `path` is named; empty: beside the config, or with the weights.
    """

    config: str = ""
    path: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if bool(self.config) == bool(self.path):
            raise MoejaxError(
                f'model.config="{self.config}" and model.path="{self.path}": set one, config for random weights of a '
                "config.json or path for the weights of a Hugging Face folder"
            )


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """What a step reads.

    Attributes:
      batch: sequences of one step, over all devices.
      length: tokens of a sequence.
      root: where the paths of the mixture and of `eval.data` start, relative to the current folder.
      mixture: files and their shares.
    """

    batch: int
    length: int
    root: str = ""
    mixture: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        _at_least("data.batch", self.batch, 1)
        _at_least("data.length", self.length, 2)

    def find(self, path: str) -> str:
        """A path of the recipe as it is opened."""
        return os.path.expanduser(os.path.join(self.root, path))


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """AdamW; see `moejax.training.optimizer`.

    Attributes:
      lr: the highest learning rate, which the first `warmup` steps climb to from 0.
      min_lr_ratio: of `lr`, where the cosine ends at the recipe's last step.
      clip: the largest norm of all gradients together; 0 clips nothing.
      max_skipped: so many steps in a row whose loss or gradient is not finite end the run.
    """

    lr: float = 3e-4
    warmup: int = 100
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            _above("optimizer." + name, getattr(self, name), 0)
        for name in ("warmup", "min_lr_ratio", "weight_decay", "beta1", "beta2", "clip"):
            _at_least("optimizer." + name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise MoejaxError(f"optimizer.{name}={getattr(self, name)} must be below 1")
        if self.min_lr_ratio > 1:
            raise MoejaxError(f"optimizer.min_lr_ratio={self.min_lr_ratio} must be at most 1")
        _at_least("optimizer.max_skipped", self.max_skipped, 1)


@dataclass(frozen=True, slots=True)
class CheckpointRecipe:
    """A save follows every so many steps, and the last one in any case.

    Attributes:
      keep_last: how many of the newest are kept.
      keep_best: how many more, of those that an evaluation came with, by the mean of its losses.
    """

    every: int = 500
    keep_last: int = 2
    keep_best: int = 0

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_best", self.keep_best, 0)


@dataclass(frozen=True, slots=True)
class EvalRecipe:
    """An evaluation follows every so many steps and the last one; `every` 0: none does. Paths start at `data.root`."""

    every: int = 0
    data: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 0)
        if self.every and not self.data:
            raise MoejaxError(
                f"eval.every={self.every} needs eval.data, the files to evaluate; eval.every=0 evaluates nothing"
            )


@dataclass(frozen=True, slots=True)
class MetricsRecipe:
    """Beside metrics.jsonl.

    Attributes:
      peak_flops: of all devices together, for the MFU; 0: no MFU.
      tensorboard: write event files too.
    """

    peak_flops: float = 0.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _at_least("metrics.peak_flops", self.peak_flops, 0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run.

    Attributes:
      steps: those of the whole schedule.
      seed: of random weights, of the order of documents, and of router noise.
      dtype: of the forward and backward pass; master weights and optimizer are f32.
      accumulate: parts that a step's batch is computed in, one after another.
      remat: compute activations again in the backward pass, which takes less memory and more time.
    """

    steps: int
    model: ModelRecipe
    data: DataRecipe
    seed: int = 0
    dtype: str = "bfloat16"
    accumulate: int = 1
    remat: bool = False
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    losses: LossSettings = field(default_factory=LossSettings)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    metrics: MetricsRecipe = field(default_factory=MetricsRecipe)

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        _at_least("seed", self.seed, 0)
        _at_least("accumulate", self.accumulate, 1)
        if self.dtype not in DTYPES:
            raise MoejaxError(f"dtype={self.dtype} is none of {', '.join(DTYPES)}")
        if self.data.batch % self.accumulate:
            raise MoejaxError(f"data.batch={self.data.batch} is no multiple of accumulate={self.accumulate}")


DTYPES = ("float32", "bfloat16")


def read_recipe(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked.

    Raises:
      MoejaxError: no such file, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoejaxError(f"cannot read the recipe {path}: {error.strerror}") from error
    except ValueError as error:
        raise MoejaxError(f"the recipe {path} is no valid TOML ({error})") from error


def make_recipe(raw: Mapping[str, Any]) -> Recipe:
    """The recipe, every field checked.

    Raises:
      MoejaxError: naming the field, its value and the remedy.
    """
    recipe = tables.read(Recipe, raw)
    if not recipe.data.mixture:
        raise MoejaxError("data.mixture is empty; give it a file, in the recipe or by --data PATH")
    return recipe


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise MoejaxError(f"{name}={value} must be at least {least}")


def _above(name: str, value: float, bound: float) -> None:
    if value <= bound:
        raise MoejaxError(f"{name}={value} must be above {bound}")
