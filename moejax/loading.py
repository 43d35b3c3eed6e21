"""From a name to a model on a mesh, and back to a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from moejax.checkpoint.huggingface import load_parameters
from moejax.checkpoint.saving import save_checkpoint
from moejax.checkpoint.source import read_json, resolve
from moejax.checkpoint.writing import SHARD_BYTES
from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families import family_of
from moejax.inference.tokenizer import Tokenizer
from moejax.language_model import LanguageModel, role_of
from moejax.mesh import make_mesh
from moejax.model import Decoder, Options
from moejax.moe.router import Router
from moejax.opening import Checkpoint, checkpoint_plan
from moejax.sharding import AnyMesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load(
    model: str | Path = "demo",
    *,
    mesh: Mesh | None = None,
    dtype: str = "auto",
    strategy: str = "auto",
    capacity_factor: float | None = None,
    chunks: int = 1,
    packed: bool = True,
    router: Router | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Loads a Hugging Face checkpoint onto a mesh; each device's part is read from the files by itself.

    Args:
      model: a folder, a hub id `org/name[@revision]`, or "demo", the embedded model.
      mesh: from `make_mesh`; None takes all devices.
      dtype: "auto" is the checkpoint's; "float32", "bfloat16" or "float16" converts while loading.
      strategy: "auto", "all_to_all" or "all_reduce"; see `moejax.moe`.
      capacity_factor: None drops nothing; see `moejax.moe`.
      chunks: slices of the all_to_all exchange; see `moejax.moe`.
      packed: experts stored as MXFP4 stay so in device memory and are unpacked as they are used; False unpacks them
        while loading, which is faster to compute with and takes 3.8 times the memory in bfloat16.
      router: replaces the config's in all layers; see `MoE`.
      progress: called with (bytes loaded, bytes in all).

    Raises:
      MoejaxError: no such model, a config that is not supported, or files that do not fit it; the message says which.
    """
    options = Options(strategy, capacity_factor, chunks)
    folder = resolve(str(model))
    with Checkpoint.open(folder, packed) as checkpoint:
        config = checkpoint.config
        mesh = _with_auto_axes(mesh if mesh is not None else make_mesh(num_experts=config.num_experts))
        layout = checkpoint.plan(mesh)
        graph, abstract = abstract_decoder(config, mesh, dtype_of(dtype, config), router)
        wanted = {role_of(path): leaf for path, leaf in abstract.items()}
        loaded = load_parameters(checkpoint.files, layout, wanted, progress)
    state = nnx.from_flat_state([(path, nnx.Param(loaded[role_of(path)])) for path in abstract])
    return LanguageModel(
        config=config,
        decoder=nnx.merge(graph, state),
        mesh=mesh,
        options=options,
        folder=folder,
        raw_config=checkpoint.raw_config,
        generation_config=read_json(folder, "generation_config.json", required=False),
        tokenizer=Tokenizer.from_folder(folder),
        left_out=checkpoint.left_out,
    )


def save_pretrained(model: LanguageModel, path: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the model as a Hugging Face folder that transformers loads to the same logits.

    Args:
      model: with its parameters in the dtype they are to be saved in.
      path: a folder that does not exist yet, or is empty.
      max_shard_bytes: largest weights file.

    Raises:
      MoejaxError: the folder holds something already, or cannot be written.
    """
    companions = [model.folder / name for name in COMPANIONS if (model.folder / name).is_file()]
    layout = checkpoint_plan(model.config, model.mesh)
    raw = plain_config(model.raw_config, model.config)
    save_checkpoint(model.parameters(), layout, raw, companions, Path(path), max_shard_bytes=max_shard_bytes)


def plain_config(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """config.json of a checkpoint that moejax writes: of the same model, and true of the files that go with it.

    Args:
      raw: the text model's config.json as it was read.
      config: what was made of it and of its weights.
    """
    plain = dict(raw)
    if not any(layer.moe and layer.moe.packed for layer in config.layers):
        plain.pop("quantization_config", None)
    plain.pop("auto_map", None)  # of code files, which are not written
    if plain.get("tie_word_embeddings", False) != config.tie_word_embeddings:
        plain["tie_word_embeddings"] = config.tie_word_embeddings
    family = family_of(plain["model_type"])
    if plain["model_type"] != family.model_type:  # an alias, which only a model's own code knows
        plain |= {"model_type": family.model_type, "architectures": [family.architecture]}
    return plain


def abstract_decoder(
    config: ModelConfig, mesh: AnyMesh, dtype: Any, router: Router | None = None
) -> tuple[Any, dict[tuple, jax.ShapeDtypeStruct]]:
    """The decoder's structure, and the shape, dtype and sharding of each parameter, without making any of them."""
    return abstract(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0), dtype=dtype, router=router), mesh)


def abstract(module: Callable[[], nnx.Module], mesh: AnyMesh) -> tuple[Any, dict[tuple, jax.ShapeDtypeStruct]]:
    """The same of what `module` would make."""
    graph, state = nnx.split(nnx.eval_shape(module))
    leaves = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.get_metadata()["out_sharding"])
        )
        for path, leaf in nnx.to_flat_state(state)
    }
    return graph, leaves


def dtype_of(name: str, config: ModelConfig) -> Any:
    """The dtype that "auto", or a name, stands for.

    Raises:
      MoejaxError: a name that is none of them.
    """
    if name != "auto" and name not in DTYPES:
        raise MoejaxError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[config.dtype if name == "auto" else name]


def _with_auto_axes(mesh: Any) -> Mesh:
    """The mesh as the model's programs are written for; `jax.make_mesh` makes Explicit axes unless told otherwise."""
    if not isinstance(mesh, Mesh):
        raise MoejaxError(f'mesh={mesh!r:.60} is no jax.sharding.Mesh; make one with moejax.make_mesh("ep=4,tp=2")')
    if tuple(mesh.axis_names) != ("ep", "tp"):
        raise MoejaxError(f'the mesh has axes {mesh.axis_names}; models run on ("ep", "tp"), see moejax.make_mesh')
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * 2)
