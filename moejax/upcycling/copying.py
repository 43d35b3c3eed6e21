"""Writes the mixture that a dense checkpoint becomes: its MLP copied into every expert, the rest as it is.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints".
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import AbstractMesh

from moejax.checkpoint.huggingface import cast, check, settle_tied_head
from moejax.checkpoint.pieces import Plan, whole
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.source import read_json
from moejax.checkpoint.writing import SHARD_BYTES, SPELLINGS, Stored, occupied, with_dtype, write_folder
from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families import read_config
from moejax.families.fields import Fields
from moejax.loading import COMPANIONS
from moejax.opening import checkpoint_plan
from moejax.upcycling.families import dense_family_of
from moejax.upcycling.rewriting import sparse_config

Progress = Callable[[int, int], None]

# Of the normal distribution that routers start from, where the config states none.
_INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Upcycled:
    """What was written.

    Attributes:
        folder: where.
        config: of the mixture.
        parameters: of the mixture.
        bytes: of its weights.
        dropped: fields of the dense config.json that did not carry over, and why.
    """

    folder: Path
    config: ModelConfig
    parameters: int
    bytes: int
    dropped: Mapping[str, str]


@dataclass(frozen=True)
class _Chances:
    """Normal noise on experts and normal routers, by seed and tensor name.

    Attributes:
        noise: standard deviation, in those of the tensor that is copied.
        router_scale: standard deviation of routers.
    """

    noise: float
    router_scale: float
    seed: int

    def router(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """In float32."""
        return self.router_scale * self._normal(name, shape)

    def expert(self, name: str, data: np.ndarray, deviation: float) -> np.ndarray:
        """In float32, where there is noise."""
        if not self.noise:
            return data
        values = self._normal(name, data.shape)
        values *= self.noise * deviation
        values += data
        return values

    def _normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return generator.standard_normal(shape, np.float32)


def upcycle(
    source: Path,
    folder: Path,
    *,
    experts: int,
    top_k: int,
    noise: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Upcycled:
    """Writes the mixture as a Hugging Face folder of a family that moejax and transformers load.

    Without noise it computes what the dense model does, because the weights of a token's experts sum to 1. One tensor
    of the dense model is held at a time, and with noise one expert's.

    Args:
        source: folder of a dense Hugging Face model; see `families.DENSE`.
        folder: must not exist, or be empty.
        experts: in each layer.
        top_k: experts a token.
        noise: normal noise on each expert's matrices, in standard deviations of the matrix that is copied.
        seed: of the noise and of the routers, which are normal with the config's `initializer_range`.
        dtype: of the written weights; "auto" keeps each tensor's.
        max_shard_bytes: see `write_folder`.
        progress: called with (bytes written, bytes in all).

    Raises:
        MoejaxError: no dense model, one with something that the mixture's family cannot express, numbers that make no
            sense, or a folder that holds something or cannot be written.
    """
    if fault := occupied(folder):
        raise MoejaxError(fault)
    if not 0 <= noise < math.inf:
        raise MoejaxError(f"noise={noise} must be at least 0 (0.1 is a tenth of each matrix's standard deviation)")
    if seed < 0:
        raise MoejaxError(f"seed={seed} must be at least 0")
    raw = read_json(source, "config.json")
    family = dense_family_of(raw.get("model_type"))
    config = family.to_config(raw)
    chances = _Chances(noise, Fields(raw).optional_number("initializer_range") or _INITIALIZER_RANGE, seed)
    with CheckpointFiles.open(source) as opened:
        config, files = settle_tied_head(config, family.sparse.names, opened)
        written, dropped = sparse_config(raw, family, config, experts, top_k)
        sparse = read_config(written)
        plan = checkpoint_plan(config, AbstractMesh((1, 1), ("ep", "tp")))
        check(plan, files, family.sparse.ignored_tensors)
        layout = _Layout.of(plan, sparse, family.sparse.names, files, dtype)
        documents = {"config.json": with_dtype(written, next(iter(layout.stored.values())).dtype.name)}
        companions = [source / name for name in COMPANIONS if (source / name).is_file()]
        with files:
            tensors = _reported(_tensors(layout, files, chances), layout.bytes, progress)
            write_folder(folder, layout.stored, tensors, documents, companions, max_shard_bytes)
    parameters = sum(math.prod(tensor.shape) for tensor in layout.stored.values())
    return Upcycled(folder, sparse, parameters, layout.bytes, dropped)


@dataclass(frozen=True)
class _Layout:
    """Which tensors there will be.

    Attributes:
        copies: tensor of the dense model -> those that it becomes: itself, or one an expert.
        routers: those that come from nowhere.
        stored: all of them, copies first, in the order of writing.
    """

    copies: Mapping[str, tuple[str, ...]]
    routers: tuple[str, ...]
    stored: Mapping[str, Stored]

    @classmethod
    def of(
        cls, plan: Plan, sparse: ModelConfig, names: Mapping[str, str], files: CheckpointFiles, dtype: str
    ) -> "_Layout":
        layers, experts = range(sparse.num_layers), range(sparse.num_experts)
        copied = {
            names[f"layers.{{l}}.mlp.{part}"].format(l=layer): tuple(
                names[f"layers.{{l}}.moe.{part}"].format(l=layer, e=expert) for expert in experts
            )
            for layer in layers
            for part in ("gate", "up", "down")
        }
        copies = {name: copied.get(name, (name,)) for name in plan.shapes}
        routers = tuple(names["layers.{l}.moe.router"].format(l=layer) for layer in layers)

        def stored(name: str, shape: tuple[int, ...]) -> Stored:
            return Stored(shape, files.tensors[name].dtype if dtype == "auto" else SPELLINGS[dtype])

        tensors = {new: stored(old, plan.shapes[old]) for old, new_names in copies.items() for new in new_names}
        shape = (sparse.num_experts, sparse.hidden_size)
        return cls(copies, routers, tensors | {router: stored(names["embed"], shape) for router in routers})

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.stored.values())


def _tensors(layout: _Layout, files: CheckpointFiles, chances: _Chances) -> Iterator[np.ndarray]:
    """The mixture's tensors in the order of `layout.stored`."""
    for name, copies in layout.copies.items():
        data = files.read(name, whole(files.tensors[name].shape))
        if copies == (name,):
            yield cast(data, layout.stored[name].dtype, name)
            continue
        deviation = float(data.std(dtype=np.float64)) if chances.noise else 0.0
        for copy in copies:
            yield cast(chances.expert(copy, data, deviation), layout.stored[copy].dtype, name)
    for name in layout.routers:
        yield chances.router(name, layout.stored[name].shape).astype(layout.stored[name].dtype)


def _reported(tensors: Iterator[np.ndarray], total: int, progress: Progress | None) -> Iterator[np.ndarray]:
    """The same tensors; after each, `progress` hears of it."""
    done = 0
    for tensor in tensors:
        yield tensor
        done += tensor.nbytes
        if progress:
            progress(done, total)
