"""The dense gated MLP of layers that are no mixture of experts."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moejax.config import Activation
from moejax.moe.experts import gated_mlp
from moejax.nn.stream import Stream
from moejax.sharding import AnyMesh, axis_size, psum, sharded_param


class DenseMLP(nnx.Module):
    """`down(activation(gate x) * up x)`, hidden width cut over `tp` and zero-padded to divide.

    Parameters are `gate_up [D, 2, F]`, `down [F, D]` and, with `bias`, `gate_up_bias [2, F]`, `down_bias [D]`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation,
        *,
        bias: bool = False,
        mesh: AnyMesh,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        """Random weights; biases are 0."""
        self.activation: Activation = activation
        tp = axis_size(mesh, "tp")
        padding = -hidden % tp

        def param(shape: tuple[int, ...], axis: int, *cut: str | None) -> nnx.Param:
            value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(shape[0] ** -0.5, dtype)
            widths = [(0, padding if i == axis else 0) for i in range(len(shape))]
            return sharded_param(jnp.pad(value, widths), mesh, *cut)

        self.gate_up = param((width, 2, hidden), 2, None, None, "tp")
        self.down = param((hidden, width), 0, "tp", None)
        zeros = functools.partial(jnp.zeros, dtype=dtype)
        self.gate_up_bias = sharded_param(zeros((2, hidden + padding)), mesh, None, "tp") if bias else None
        self.down_bias = sharded_param(zeros(width), mesh, None) if bias else None

    def __call__(self, x: Float[Array, "B S D"], stream: Stream) -> Float[Array, "B S D"]:
        """The MLP of every token."""

        def local(x: jax.Array, gate_up: jax.Array, down: jax.Array, bias: jax.Array | None) -> jax.Array:
            return psum(gated_mlp(x, gate_up, down, self.activation, bias), stream.tp_axes)

        rows, tp = stream.batch_spec, stream.tp
        specs = (rows, stream.spec(None, None, tp), stream.spec(tp), stream.spec(None, tp))
        mapped = jax.shard_map(local, mesh=stream.mesh, in_specs=specs, out_specs=rows, check_vma=True)
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        y = mapped(x, self.gate_up[...], self.down[...], bias)
        return y if self.down_bias is None else y + self.down_bias[...]
