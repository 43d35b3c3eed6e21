"""Dense parameters and the optimizer's state of them, cut over `ep` as well.

Experts are over both axes of the mesh as it is. All else lies whole on every device along `ep`, and its master weights
and moments, 12 bytes a parameter, need not: each device keeps and updates a part, and a step gathers the parts in the
dtype that it computes in.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stages 1 and 2.
"""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec


def spread(leaf: Any, mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter's master weights: its own, and over `ep` where it does not use that axis.

    The longest axis that `ep` divides is cut, and one that `tp` cuts already only where no other can be; what has no
    such axis stays whole.

    Args:
      leaf: an array or ShapeDtypeStruct in the sharding that the model takes it in.
    """
    spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
    ep, used = mesh.shape["ep"], {name for entry in spec for name in _names(entry)}
    if ep > 1 and "ep" not in used:
        parts = leaf.sharding.shard_shape(leaf.shape)
        axes = [axis for axis, size in enumerate(parts) if size % ep == 0]
        if axes:
            best = max(axes, key=lambda axis: (spec[axis] is None, parts[axis]))
            names = (*_names(spec[best]), "ep")
            spec[best] = names if len(names) > 1 else names[0]
    # Spelled as compiled programs spell their results', lest the second step compile anew.
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
