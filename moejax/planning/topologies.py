"""Meshes of H100s and TPUs that need not be there: programs compile for them, but do not run.

GPUs take JAX's CUDA plugin (without a driver), TPUs take libtpu. `h100.txtpb` describes an H100 SXM to the compiler.
"""

import math
from importlib import resources

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moejax.errors import MoejaxError
from moejax.mesh import AXES, parse_mesh

NODE = 8
"""H100s of one machine."""

_TPU_SLICES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


def h100_mesh(spec: str) -> Mesh:
    """The mesh of a spec such as "ep=4,tp=2" over H100s, 8 to a machine; tp innermost, as `moejax.make_mesh` has it.

    Raises:
      MoejaxError: no CUDA plugin, a bad spec, or machines that would not be full.
    """
    devices = parse_mesh(spec).size
    if devices > NODE and devices % NODE:
        raise MoejaxError(f'mesh "{spec}" has {devices} devices, which do not fill machines of {NODE} H100s')
    machines = max(1, devices // NODE)
    target = (resources.files("moejax.planning") / "h100.txtpb").read_text(encoding="utf-8")
    topology = f"1x{machines}x{devices // machines}"
    return _mesh(spec, "cuda", 'pip install "moejax[cuda12]"', "", target_config=target, topology=topology)


def tpu_mesh(spec: str) -> Mesh:
    """The mesh of a spec over a slice of TPU v5p.

    Raises:
      MoejaxError: no libtpu, a bad spec, or a number of devices that no slice has.
    """
    devices = parse_mesh(spec).size
    if devices not in _TPU_SLICES:
        sizes = ", ".join(map(str, _TPU_SLICES))
        raise MoejaxError(f'mesh "{spec}" has {devices} devices; slices of TPU v5p have {sizes}')
    return _mesh(spec, "tpu", "pip install libtpu", f"v5p:{_TPU_SLICES[devices]}")


def _mesh(spec: str, platform: str, remedy: str, name: str, **options: str) -> Mesh:
    shape = parse_mesh(spec)
    try:
        devices = topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise MoejaxError(f"no program compiles for {platform} here ({reason}); {remedy}") from error
    assert len(devices) == math.prod((shape.ep, shape.tp))
    return jax.make_mesh((shape.ep, shape.tp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
