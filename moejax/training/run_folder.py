"""A run's folder: what lies where in it, and what may change between a run and its continuation."""

import dataclasses
import json
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoint.source import read_json
from moejax.errors import MoejaxError
from moejax.training import tables
from moejax.training.recipe import Recipe, make_recipe


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths in it.

    recipe.toml    the recipe as it was resolved; written last, so that where it is, a run is
    model/         config.json, tokenizer and generation_config.json, as a Hugging Face folder without weights
    metrics.jsonl  a line for each step, see `moejax.training.metrics`
    tensorboard/   the same for TensorBoard
    checkpoints/   a folder for each saved step
    cache/         tokens of the data
    """

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def holds_run(self) -> bool:
        return self.recipe.is_file()

    def read_recipe(self) -> Recipe:
        """The recipe of the run that is there."""
        return make_recipe(tomllib.loads(self.recipe.read_text(encoding="utf-8")))

    def last_save(self) -> int | None:
        """The newest step that is saved, where a run is here. Starts no backend, as orbax would."""
        if not self.holds_run or not self.checkpoints.is_dir():
            return None
        return max((int(entry.name) for entry in self.checkpoints.iterdir() if entry.name.isdigit()), default=None)

    def check_fresh(self) -> None:
        """
        Raises:
          MoejaxError: it has a run already, or is a file.
        """
        if self.holds_run:
            raise MoejaxError(f"{self.path} has a run already; continue it with --resume, or name another folder")
        if self.path.exists() and not self.path.is_dir():
            raise MoejaxError(f"{self.path} is a file; name a folder for the run")

    def write_model(self, config: Mapping[str, Any], companions: Sequence[Path]) -> None:
        """Writes `model/`, all of it or nothing.

        Raises:
          MoejaxError: it cannot be written.
        """
        partial = self.path / ".model.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in companions:
                shutil.copyfile(file, partial / file.name)
            shutil.rmtree(self.model, ignore_errors=True)
            partial.rename(self.model)
        except OSError as error:
            raise MoejaxError(f"cannot write {self.model}: {error.strerror}") from error

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes or replaces recipe.toml.

        Raises:
          MoejaxError: it cannot be written.
        """
        partial = self.path / ".recipe.toml.partial"
        try:
            partial.write_text(tables.write(recipe) + "\n", encoding="utf-8")
            os.replace(partial, self.recipe)
        except OSError as error:
            raise MoejaxError(f"cannot write {self.recipe}: {error.strerror}") from error


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[str, str]]:
    """Full name -> value before and after, for fields that differ between a run and its continuation.

    Raises:
      MoejaxError: one differs that decides which weights there are or which data come next.
    """
    before, after = _flat(old), _flat(new)
    differ = {name: (before.get(name, "unset"), after.get(name, "unset")) for name in {**before, **after}}
    differ = {name: pair for name, pair in differ.items() if pair[0] != pair[1]}
    for name, (was, now) in differ.items():
        # A file may have moved; that it is the same one, the data's own position knows.
        moved = name.endswith(".path") and name in before and name in after
        if (
            name in ("seed", "data.length")
            or name.startswith("model.")
            or (name.startswith("data.mixture.") and not moved)
        ):
            raise MoejaxError(
                f"{name} was {was} in this run and is {now} now, with which its weights and its place in the data are "
                "of no use; resume without that change, or start a run in another folder"
            )
    return differ


def _flat(record: Any, prefix: str = "") -> dict[str, str]:
    """Full name -> value as TOML writes it."""
    values: dict[str, str] = {}
    for field in dataclasses.fields(record):
        name, value = f"{prefix}{field.name}", getattr(record, field.name)
        entries = {name: value}
        if isinstance(value, tuple):
            entries = {f"{name}.{index}": item for index, item in enumerate(value)}
        for full, item in entries.items():
            if dataclasses.is_dataclass(item):
                values |= _flat(item, f"{full}.")
            elif item is not None:
                values[full] = tables.shown(item)
    return values


def check_config(folder: Path, raw: Mapping[str, Any]) -> None:
    """Compares the config of a run with the one that a continuation names.

    Raises:
      MoejaxError: they differ; it names the first field.
    """
    old = read_json(folder, "config.json")
    for name in {**old, **raw}:
        if old.get(name) != raw.get(name):
            raise MoejaxError(
                f"config.json: {name} is {raw.get(name)!r}, and the run was started with {old.get(name)!r}; resume "
                "with the config it was started with, or start a run in another folder"
            )
