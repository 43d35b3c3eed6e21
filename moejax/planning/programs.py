"""A model's real steps compiled for a mesh from shapes alone: no weight is made, and no device need be there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.config import ModelConfig, MoEConfig
from moejax.inference.steps import Requests, Step, begin, decode, prefill
from moejax.loading import abstract
from moejax.model import Decoder, Lie, Options, lay
from moejax.moe.layer import MoE

AUTO = Options()


def compile_prefill(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    chunk: int,
    max_len: int,
    options: Options = AUTO,
    dtype: DTypeLike = jnp.bfloat16,
) -> jax.stages.Compiled:
    """The engine's step that runs `chunk` tokens of each prompt over caches of `max_len` places."""
    graph, state = _decoder(config, mesh, dtype)
    lie = lay(batch, mesh, options)
    step, requests = _begun(graph, state, lie, max_len)
    tokens, first = _rows(lie, jnp.int32, chunk), _whole(mesh, jnp.int32)
    return prefill.lower(graph, lie, state, step, tokens, first, requests).compile()


def compile_decode(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    max_len: int,
    options: Options = AUTO,
    dtype: DTypeLike = jnp.bfloat16,
) -> jax.stages.Compiled:
    """The engine's step that draws more tokens for each row, in a loop, over caches of `max_len` places."""
    graph, state = _decoder(config, mesh, dtype)
    lie = lay(batch, mesh, options)
    step, requests = _begun(graph, state, lie, max_len)
    budgets = _shape(mesh, PartitionSpec(mesh.axis_names), jnp.int32, mesh.size)
    return decode.lower(graph, lie, state, step, _rows(lie, jnp.int32), budgets, requests).compile()


def compile_layer(
    config: MoEConfig, mesh: Mesh, *, tokens: int, options: Options = AUTO, dtype: DTypeLike = jnp.bfloat16
) -> jax.stages.Compiled:
    """One mixture-of-experts layer over `tokens` tokens, router and shared expert included."""
    graph, state = _split(lambda: MoE(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh), mesh)
    lie = lay(tokens, mesh, options)

    def layer(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).with_details(x, parallel=lie.parallel)[0]

    return jax.jit(layer).lower(state, _rows(lie, dtype, config.hidden_size)).compile()


def _decoder(config: ModelConfig, mesh: Mesh, dtype: DTypeLike) -> tuple[Any, Any]:
    return _split(lambda: Decoder(config, mesh=mesh, rngs=nnx.Rngs(0), dtype=dtype), mesh)


def _split(module: Callable[[], nnx.Module], mesh: Mesh) -> tuple[Any, Any]:
    """A module as compiled functions take it, its parameters mere shapes."""
    graph, leaves = abstract(module, mesh)
    return graph, nnx.from_flat_state([(path, nnx.Param(leaf)) for path, leaf in leaves.items()])


def _begun(graph: Any, state: Any, lie: Lie, max_len: int) -> tuple[Step, Requests]:
    """What the first step of a greedy engine finds, as shapes; how caches lie on the mesh is the compiler's word."""
    mesh = lie.stream.mesh
    requests = Requests(
        lengths=_rows(lie, jnp.int32),
        numbers=_rows(lie, jnp.int32),
        seed=_whole(mesh, jnp.uint32),
        eos=_whole(mesh, jnp.int32, 8),
        filters=None,
        penalty=None,
    )
    program = begin.lower(graph, max_len, False, False, lie, state, requests.lengths).compile()
    step = jax.tree.map(
        lambda made, sharding: jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=sharding),
        program.out_info,
        program.output_shardings,
    )
    return step, requests


def _rows(lie: Lie, dtype: DTypeLike, *rest: int) -> Any:
    """An input with one entry a row of the batch, cut as the stream is."""
    return _shape(lie.stream.mesh, lie.stream.batch_spec, dtype, lie.rows, *rest)


def _whole(mesh: Mesh, dtype: DTypeLike, *shape: int) -> Any:
    return _shape(mesh, PartitionSpec(), dtype, *shape)


def _shape(mesh: Mesh, spec: PartitionSpec, dtype: DTypeLike, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
