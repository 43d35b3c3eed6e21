"""A training state in a form that no mesh has a part in: what a run's checkpoints hold.

Every array has its form on one device: no empty expert slot, no padded width or vocabulary, one copy of each key/value
head. Where the mesh stores an array in that form already, nothing is computed and nothing is copied.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.config import ModelConfig
from moejax.stored_forms import StoredForm, stored_forms

PARAMETERS = "params."
"""How the names of parameters begin; their roles follow."""


class NeutralForm:
    """The way of a state on a mesh to its neutral form, and back.

    Attributes:
      abstract: shape, dtype and sharding of each array in neutral form, by its path in the state:
        "params.layers.0.moe.gate_up", "optimizer.0.mu.embed".
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, like: Any):
        """
        Args:
          config: the model's.
          mesh: where the state lies.
          like: the state, as arrays or as ShapeDtypeStructs with shardings. What has a parameter's role for its last
            key, and the parameter's shape, is stored as the parameter is.
        """
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(like)
        here = {_name(path): leaf for path, leaf in leaves}
        assert len(here) == len(leaves), "two arrays of the state have one name"
        self._forms = dict(_changed(stored_forms(config, mesh), leaves))
        there = {name: here[name].sharding for name in self._forms}
        self._neutral = {name: _sharding(there[name], form, here[name].shape) for name, form in self._forms.items()}
        self._to_neutral = jax.jit(self._contract, out_shardings=self._neutral)
        self._to_mesh = jax.jit(self._expand, out_shardings=there)
        shapes = {name: leaf.shape for name, leaf in here.items()}
        shapes |= {name: leaf.shape for name, leaf in jax.eval_shape(self._contract, _only(here, self._forms)).items()}
        self.abstract = {
            name: jax.ShapeDtypeStruct(shapes[name], leaf.dtype, sharding=self._neutral.get(name, leaf.sharding))
            for name, leaf in here.items()
        }

    def of(self, state: Any) -> dict[str, jax.Array]:
        """A state's arrays in neutral form, by name."""
        arrays = dict(zip(self.abstract, jax.tree.leaves(state), strict=True))
        return arrays | self._to_neutral(_only(arrays, self._forms))

    def state(self, arrays: Mapping[str, jax.Array]) -> Any:
        """The way back, to where `like` lies."""
        there = dict(arrays) | self._to_mesh(_only(arrays, self._forms))
        return jax.tree.unflatten(self._tree, [there[name] for name in self.abstract])

    def _contract(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # Moved first, so that each device has all of the axes that change, and takes what it keeps by itself.
        moved = {name: jax.lax.with_sharding_constraint(x, self._neutral[name]) for name, x in arrays.items()}
        return {name: self._forms[name].contract(x) for name, x in moved.items()}

    def _expand(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: self._forms[name].expand(x) for name, x in arrays.items()}


def _name(path: Sequence[Any]) -> str:
    """A leaf's path, its keys, fields and places joined by dots."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _changed(
    forms: Mapping[str, StoredForm], leaves: Sequence[tuple[Sequence[Any], Any]]
) -> Iterator[tuple[str, StoredForm]]:
    """Names of the leaves that the mesh stores otherwise than one device, and how."""
    shapes = {_name(path): leaf.shape for path, leaf in leaves}
    assert all(f"{PARAMETERS}{role}" in shapes for role in forms), "the state lacks parameters of the model"
    for path, leaf in leaves:
        role = getattr(path[-1], "key", None) if path else None
        if role in forms and forms[role].axes and leaf.shape == shapes.get(f"{PARAMETERS}{role}"):
            yield _name(path), forms[role]


def _only(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: mapping[name] for name in names}


def _sharding(there: NamedSharding, form: StoredForm, shape: tuple[int, ...]) -> NamedSharding:
    """The same cuts, but for those of axes that the form changes: each moves to another axis that it divides.

    In neutral form an axis may have a length that the mesh does not divide. What no other axis can take is not cut.
    """
    cuts = [_axes(entry) for entry in (*there.spec, *[None] * (len(shape) - len(there.spec)))]
    homeless = [axis for place in form.axes for axis in cuts[place]]
    for place in form.axes:
        cuts[place] = ()
    for axis in homeless:
        for place, size in enumerate(shape):
            parts = math.prod(there.mesh.shape[name] for name in (*cuts[place], axis))
            if place not in form.axes and size % parts == 0:
                cuts[place] = (*cuts[place], axis)
                break
    return NamedSharding(there.mesh, PartitionSpec(*(axes or None for axes in cuts)))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
