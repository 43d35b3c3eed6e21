"""What a run starts from: a config with random weights, a checkpoint's weights, or the run's own model folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.checkpoint.source import read_json, resolve
from moejax.config import ModelConfig
from moejax.data.encoder import DocumentEncoder
from moejax.errors import MoejaxError
from moejax.families import read_config, text_config
from moejax.loading import COMPANIONS, load, plain_config
from moejax.opening import Checkpoint
from moejax.training.recipe import ModelRecipe, Recipe
from moejax.training.state import random_parameters


@dataclass(frozen=True)
class Start:
    """A model to be trained, without its weights.

    Attributes:
      raw_config: config.json as the run keeps it.
      config: the same as the model takes it.
      tokenizer_folder: where its tokenizer is.
      weights: the checkpoint's folder, or None for random weights.
    """

    raw_config: Mapping[str, Any]
    config: ModelConfig
    tokenizer_folder: Path
    weights: Path | None

    @classmethod
    def of(cls, recipe: ModelRecipe) -> "Start":
        """Finds what the recipe names.

        Raises:
          MoejaxError: there is no such file or model, or it is not supported.
        """
        if recipe.path:
            folder = resolve(recipe.path)
            with Checkpoint.open(folder) as checkpoint:
                raw, config = checkpoint.raw_config, checkpoint.config
            tokenizer = resolve(recipe.tokenizer) if recipe.tokenizer else folder
            return cls(plain_config(raw, config), config, tokenizer, folder)
        path = Path(recipe.config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        raw = text_config(read_json(path.parent, path.name))
        config = read_config(raw)
        tokenizer = resolve(recipe.tokenizer) if recipe.tokenizer else path.parent
        return cls(plain_config(raw, config), config, tokenizer, None)

    @classmethod
    def of_run(cls, folder: Path) -> "Start":
        """That of a run which is to be continued, from its `model/`."""
        raw = read_json(folder, "config.json")
        return cls(raw, read_config(raw), folder, None)

    @property
    def companions(self) -> list[Path]:
        """Files that a run keeps beside config.json."""
        weights = self.weights or self.tokenizer_folder
        found = {name: self.tokenizer_folder / name for name in COMPANIONS if name != "generation_config.json"}
        found["generation_config.json"] = weights / "generation_config.json"
        return [path for path in found.values() if path.is_file()]

    def check(self, recipe: Recipe) -> None:
        """
        Raises:
          MoejaxError: no tokenizer, or one with more tokens than the model; rows longer than the model's context, or
            than its rope lets be packed; losses it cannot have.
        """
        length, config = recipe.data.length, self.config
        tokens = DocumentEncoder.from_folder(self.tokenizer_folder).vocab_size
        if tokens > config.vocab_size:
            raise MoejaxError(
                f"the tokenizer in {self.tokenizer_folder} has {tokens} tokens, more than the model's "
                f"vocab_size={config.vocab_size}; train with the tokenizer of the model"
            )
        if length > config.context:
            raise MoejaxError(f"data.length={length} is over the model's context of {config.context}")
        packs = all(rope.kind != "dynamic" and not rope.switches for rope in config.ropes)
        if not packs and length > config.steady_length:
            raise MoejaxError(
                f"data.length={length} packs several texts in a row, and with the model's rope scaling by length rows "
                f"can be at most {config.steady_length} long"
            )
        recipe.losses.check(config)

    def parameters(
        self, mesh: Mesh, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, jax.Array]:
        """Role -> weights in f32, on the mesh.

        Args:
          mesh: see `make_mesh`.
          seed: of random weights.
          progress: as `load` takes it.
        """
        if self.weights is None:
            return random_parameters(self.config, mesh, seed)
        return load(self.weights, mesh=mesh, dtype="float32", packed=False, progress=progress).parameters()
