"""A checkpoint folder, opened: what its model is, and its tensors by the names of the family."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

from moejax.checkpoint.huggingface import check, settle_tied_head
from moejax.checkpoint.pieces import Plan
from moejax.checkpoint.plan import MeshLayout, plan
from moejax.checkpoint.quantized import dequantised
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.source import read_json
from moejax.checkpoint.stacked import separated
from moejax.config import ModelConfig
from moejax.families import Family, family_of, read_config, text_config
from moejax.moe.placement import Placement
from moejax.sharding import AnyMesh


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config and weights. Use as a context manager: it holds files open.

    Attributes:
      folder: where it is.
      raw_config: the text model's config.json.
      config: the same as the model takes it.
      family: its family.
      files: the text model's tensors.
      left_out: tensors that a decoder has no use for, as "name (how many tensors)".
    """

    folder: Path
    raw_config: Mapping[str, Any]
    config: ModelConfig
    family: Family
    files: CheckpointFiles
    left_out: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, packed: bool = False) -> "Checkpoint":
        """Reads the config and the headers of the files, no weights.

        Args:
          folder: of a Hugging Face model.
          packed: experts stored as MXFP4 stay so; otherwise quantised weights appear dequantised.

        Raises:
          MoejaxError: a config that is not supported, or damaged files.
        """
        raw = read_json(folder, "config.json")
        config, text = read_config(raw), text_config(raw)
        family = family_of(text["model_type"])
        files = CheckpointFiles.open(folder)
        tensors, others = dict(files.tensors), []
        if family.wrapper and raw["model_type"] == family.wrapper.model_type:
            tensors, others = _unwrapped(tensors, family.wrapper.prefixes)
        patterns = family.left_out(text)
        unused = {name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)}
        others += [name for name in tensors if name in unused]
        files = CheckpointFiles(folder, {name: info for name, info in tensors.items() if name not in unused})
        if not family.experts.stacked:
            files = separated(files, family.names)
        quantization = text.get("quantization_config")
        if packed and (quantization or {}).get("quant_method") == "mxfp4":
            config = _with_packed_experts(config)
        else:
            files = dequantised(files, quantization)
        config, files = settle_tied_head(config, family.names, files)
        return cls(folder, text, config, family, files, _summary(others))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.files.close()

    def plan(self, mesh: AnyMesh) -> Plan:
        """Which part of which tensor fills which part of which parameter on this mesh, checked against the files.

        Raises:
          MoejaxError: the files do not fit the config.
        """
        layout = checkpoint_plan(self.config, mesh)
        check(layout, self.files, self.family.ignored_tensors)
        return layout


def checkpoint_plan(config: ModelConfig, mesh: AnyMesh) -> Plan:
    """Which part of which checkpoint tensor fills which part of which parameter on this mesh."""
    family = family_of(config.model_type)
    layout = MeshLayout(mesh.shape["tp"], lambda experts: Placement(experts, mesh.shape["ep"]).slot_of)
    return plan(config, family.names, family.experts, layout)


def _with_packed_experts(config: ModelConfig) -> ModelConfig:
    layers = (replace(layer, moe=layer.moe and replace(layer.moe, packed=True)) for layer in config.layers)
    return replace(config, layers=tuple(layers))


def _unwrapped(tensors: Mapping[str, Any], prefixes: tuple[tuple[str, str], ...]) -> tuple[dict[str, Any], list[str]]:
    """The text model's tensors under its own names, and the names of all others."""
    own, others = {}, []
    for name, info in tensors.items():
        match = next(((old, new) for old, new in prefixes if name.startswith(old)), None)
        if match is None:
            others.append(name)
        else:
            own[match[1] + name.removeprefix(match[0])] = info
    return own, others


def _summary(names: list[str]) -> tuple[str, ...]:
    """The module that each group of tensors belongs to, such as "model.layers.61 (1553 tensors)"."""

    def module(name: str) -> str:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        own_layer = number is not None and parts[:2] == ["model", "layers"]
        return ".".join(parts[:3] if own_layer else parts[:2] if parts[0] == "model" else parts[:1])

    counts = Counter(map(module, names))
    return tuple(f"{name} ({count} tensor{'s'[: count > 1]})" for name, count in counts.items())
