"""The collectives that the strategies are made of, alone: time and rate for each size."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.benchmarks.interleave import Spread, interleave
from moejax.errors import MoejaxError


def time_collectives(
    mesh: Mesh, sizes: Sequence[int], rounds: int, tick: Callable[[str, int], None]
) -> dict[tuple[str, str, int], Spread]:
    """Seconds for each (collective, axes, bytes): psum over every axis and over both, all_to_all over every axis.

    Args:
      mesh: at least one axis of more than one device; axes of one device are left out.
      sizes: operand bytes on each device, rounded up to what the axis divides; f32.
      rounds: see `interleave`.
      tick: see `interleave`.

    Raises:
      MoejaxError: the mesh is a single device.
    """
    live = tuple(axis for axis, size in mesh.shape.items() if size > 1)
    if not live:
        raise MoejaxError("one device has nothing to exchange; name a mesh such as --mesh ep=4,tp=2")
    cases = [("all_to_all", (axis,), size) for axis in live for size in sizes]
    sums = [(axis,) for axis in live] + ([live] if len(live) > 1 else [])
    cases += [("psum", axes, size) for axes in sums for size in sizes]
    runs = {case: _collective(mesh, *case) for case in cases}
    timed = interleave({_name(*case): run for case, run in runs.items()}, rounds, tick)
    return {(kind, "+".join(axes), size): Spread.of(timed[_name(kind, axes, size)]) for kind, axes, size in cases}


def _name(kind: str, axes: tuple[str, ...], size: int) -> str:
    return f"{kind} {'+'.join(axes)} {size}"


def _collective(mesh: Mesh, kind: str, axes: tuple[str, ...], size: int) -> Callable[[], float]:
    """One compiled collective over `axes`; every device of the mesh holds `size` bytes of its own."""
    spec = PartitionSpec(tuple(mesh.axis_names))

    def exchange(x: jax.Array) -> jax.Array:
        if kind == "psum":
            # A result that is alike everywhere, marked as one a device again so that nothing is left to gather.
            return lax.pcast(lax.psum(x, axes), axes, to="varying")
        return lax.all_to_all(x, axes[0], 0, 0, tiled=True)

    group = max(mesh.shape[axis] for axis in axes)
    here = -(-size // 4 // group) * group
    x = jax.device_put(jnp.zeros(here * mesh.size, jnp.float32), NamedSharding(mesh, spec))
    program = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)).lower(x).compile()

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(x))
        return time.perf_counter() - began

    return run
