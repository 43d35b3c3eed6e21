"""Where everything lies: which array axis is cut over which mesh axis, and the collectives that follow.

Axes of size 1 are left out of every spec and every collective, so that a program for ep=1 or tp=1 holds none for it.
"""

from collections.abc import Sequence
from typing import TypeAlias, TypeVarTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AnyMesh: TypeAlias = Mesh | AbstractMesh

COLLECTIVE = "collective"
"""The name, for rematerialisation policies, of everything that came over the mesh."""


def axis_size(mesh: AnyMesh | None, axes: str | Sequence[str] | None) -> int:
    """Devices along one mesh axis, or along several together; 1 without axes or without a mesh."""
    size = 1
    if mesh is None:
        return size
    for axis in (axes,) if isinstance(axes, str) else (axes or ()):
        size *= mesh.shape[axis]
    return size


def live_axes(mesh: AnyMesh | None, axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Those of `axes` that have more than one device."""
    if mesh is None:
        return ()
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else (axes or ())) if mesh.shape[axis] > 1)


def live_spec(mesh: AnyMesh, *dims: str | Sequence[str] | None) -> PartitionSpec:
    """A PartitionSpec over `dims` (one entry an array axis) without the mesh axes of size 1."""
    entries = (live_axes(mesh, dim) for dim in dims)
    return PartitionSpec(*(entry[0] if len(entry) == 1 else (entry or None) for entry in entries))


def sharded_param(value: jax.Array, mesh: AnyMesh | None, *cut: str | None) -> nnx.Param:
    """A parameter annotated with the mesh axes that cut it; without a mesh, a plain one."""
    return nnx.Param(value) if mesh is None else nnx.Param(value, out_sharding=live_spec(mesh, *cut), mesh=mesh)


def place(x: jax.Array, mesh: AnyMesh, spec: PartitionSpec) -> jax.Array:
    """Pins `x` to `spec` inside a compiled program, on meshes of Auto and of Explicit axes alike."""
    sharding = NamedSharding(mesh, spec)
    if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def restore(y: jax.Array, like: jax.Array) -> jax.Array:
    """`y` in the sharding of `like` where that is part of its type (Explicit axes); elsewhere the compiler decides."""
    sharding = jax.typeof(like).sharding
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
    return jax.sharding.reshard(y, sharding) if explicit else y


def varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Inside shard_map: marks `x` as differing along `axes` (what it may already be along some of them)."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def varying_as(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Inside shard_map: marks `x` as differing along every axis along which one of `others` does."""
    axes = frozenset[str]().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    return varying(x, sorted(axes))


Operands = TypeVarTuple("Operands")


def alike(*operands: *Operands) -> tuple[*Operands]:
    """Inside shard_map: marks each array of the operands as differing along every axis along which any of them does.

    So are the operands of a custom gradient, lest they differ inside it: the marks' own transpose then sums each
    gradient over the devices that share its operand.
    """
    leaves = jax.tree.leaves(operands)
    return jax.tree.map(lambda x: varying_as(x, *leaves), operands)


def psum(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`lax.psum` over `axes`; nothing at all when there are none."""
    return came(lax.psum(x, tuple(axes))) if axes else x


def came(x: jax.Array) -> jax.Array:
    """`x`, the result of a collective, by the name that keeps it when activations are computed again."""
    return checkpoint_name(x, COLLECTIVE)


def pmax(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`lax.pmax` over `axes`; nothing at all when there are none."""
    return lax.pmax(x, tuple(axes)) if axes else x


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """`x` with its `axis` filled up to `size` entries by `value`."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)
