"""What training keeps and a step replaces: f32 master weights, what the optimizer keeps of them, and counters."""

import gc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from moejax.config import ModelConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder
from moejax.model import Decoder
from moejax.stored_forms import stored_forms
from moejax.training.zero import spread

# Auto axes, as all of the model's meshes have; JAX's own default for an abstract mesh has changed.
_ALONE = AbstractMesh((1, 1), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)


@struct.dataclass
class TrainState:
    """All of a run that is on the devices; what is random follows from `key` and `step`.

    Attributes:
      params: role -> master weights, such as "layers.0.moe.gate_up", in the form that the mesh stores; dense ones are
        cut over `ep` too (see `spread`).
      optimizer: optax's state of them, lying as they do.
      step: steps taken, those that were skipped included.
      key: of everything random, the same for the whole run.
    """

    params: dict[str, Float[Array, "..."]]
    optimizer: Any
    step: Int[Array, ""]
    key: UInt[Array, "2"]

    @classmethod
    def of(
        cls, params: Mapping[str, Array], optimizer: optax.GradientTransformation, mesh: Mesh, seed: int = 0
    ) -> "TrainState":
        """The first state, from parameters on the mesh, which are consumed."""
        masters = {role: _master(p, mesh) for role, p in params.items()}
        gc.collect()  # what numpy lent to JAX goes back only now
        everywhere = NamedSharding(mesh, PartitionSpec())
        kept = jax.tree.map(lambda a: a if a.ndim else jax.device_put(a, everywhere), optimizer.init(masters))
        step, key = jax.device_put((jnp.int32(0), jax.random.PRNGKey(seed)), everywhere)
        return cls(masters, kept, step, key)

    @classmethod
    def abstract(cls, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> "TrainState":
        """Shapes, dtypes and shardings of a model's state, without any array: what a checkpoint is restored into."""
        params = {
            role_of(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread(leaf, mesh))
            for path, leaf in abstract_decoder(config, mesh, jnp.float32)[1].items()
        }
        everywhere = NamedSharding(mesh, PartitionSpec())

        def lying(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            role = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
            sharding = params[role].sharding if role in params else everywhere
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        kept = jax.tree_util.tree_map_with_path(lying, jax.eval_shape(optimizer.init, params))
        counters = (((), jnp.int32), ((2,), jnp.uint32))
        leaves: Any = (params, kept, *(jax.ShapeDtypeStruct(s, d, sharding=everywhere) for s, d in counters))
        return cls(*leaves)


def _master(param: Array, mesh: Mesh) -> jax.Array:
    """In memory of the device's own: what a file was read into can't be donated, and would stay beside its copy."""
    own = jax.device_put(jnp.array(param, jnp.float32), spread(param, mesh))
    param.delete()
    return own


def random_parameters(config: ModelConfig, mesh: Mesh, seed: int = 0) -> dict[str, Float[Array, "..."]]:
    """Role -> random weights, f32, the same model on every mesh; each device makes its own part."""
    leaves = abstract_decoder(config, mesh, jnp.float32)[1]
    forms = stored_forms(config, mesh)

    def make() -> dict[str, jax.Array]:
        alone = Decoder(config, mesh=_ALONE, rngs=nnx.Rngs(seed))
        values = {role_of(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(alone))}
        return {role: forms[role].expand(value) for role, value in values.items()}

    shardings = {role_of(path): spread(leaf, mesh) for path, leaf in leaves.items()}
    return jax.jit(make, out_shardings=shardings)()


def decoder_of(graph: Any, paths: Mapping[str, tuple[Any, ...]], params: Mapping[str, Array]) -> Decoder:
    """The decoder with these parameters."""
    return nnx.merge(graph, nnx.from_flat_state([(paths[role], nnx.Param(value)) for role, value in params.items()]))
