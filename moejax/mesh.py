"""From "ep=4,tp=2" to a `jax.sharding.Mesh`, on accelerators or on virtual CPU devices made for it."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from moejax import distributed
from moejax.errors import MoejaxError

AXES = ("ep", "tp")
# Far above what a mesh on one machine is good for, and low enough that a slip of the finger does not exhaust it.
MAX_VIRTUAL_DEVICES = 512
_INSTALL = {
    "cuda": 'pip install "moejax[cuda12]" (or "moejax[cuda13]")',
    "tpu": 'pip install "moejax[tpu]"',
}


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Devices along the expert axis and along the tensor axis."""

    ep: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.ep * self.tp

    def __str__(self) -> str:
        return f"ep={self.ep},tp={self.tp}"


def parse_mesh(spec: str) -> MeshShape:
    """Reads "ep=4,tp=2": the axes in any order, a missing one is 1. Does not touch JAX.

    Raises:
        MoejaxError: an axis that is unknown or named twice, or a size that is not a whole number from 1.
    """
    if not spec.strip():
        raise MoejaxError('the mesh is empty; write it as "ep=4,tp=2"')
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise MoejaxError(f'mesh "{spec}": "{part.strip()}" is not of the form AXIS=SIZE; write it as "ep=4,tp=2"')
        if axis not in AXES:
            raise MoejaxError(f'mesh "{spec}": unknown axis "{axis}"; the axes are ep (experts) and tp (tensors)')
        if axis in sizes:
            raise MoejaxError(f'mesh "{spec}": axis {axis} is given twice; give it once')
        if not re.fullmatch("-?[0-9]+", size):
            raise MoejaxError(f'mesh "{spec}": the size "{size}" of axis {axis} is not a whole number')
        if int(size) < 1:
            raise MoejaxError(f'mesh "{spec}": axis {axis} has size {size}; it must be at least 1')
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def default_shape(devices: int, num_experts: int | None = None) -> MeshShape:
    """All devices: ep is their largest divisor not above `num_experts` (all of them without it), tp is the rest."""
    most = devices if num_experts is None else num_experts
    ep = max(divisor for divisor in range(1, devices + 1) if devices % divisor == 0 and divisor <= max(most, 1))
    return MeshShape(ep, devices // ep)


def make_mesh(spec: str | None = None, *, num_experts: int | None = None, platform: str | None = None) -> Mesh:
    """A mesh with axes ("ep", "tp"), both `AxisType.Auto`, tp innermost.

    Where CPU devices are used and JAX has not started yet, as many virtual ones are made as the mesh needs. Several
    processes contribute equally many devices each.

    Args:
        spec: "ep=4,tp=2"; None takes all devices, see `default_shape`.
        num_experts: caps ep of the default mesh.
        platform: "cpu", "cuda" or "tpu"; None is JAX's default.

    Raises:
        MoejaxError: a bad `spec`, a platform that is not there, or a mesh that does not fit the devices or processes.
    """
    shape = None if spec is None else parse_mesh(spec)
    too_late = shape is not None and not _virtual_cpu_devices(shape, distributed.process_count())
    groups = _devices_by_process(platform)
    if shape is None:
        fewest = min(len(group) for group in groups.values())
        shape = default_shape(fewest * len(groups), num_experts)
    check_processes(shape, len(groups))
    share = shape.size // len(groups)
    for process, group in groups.items():
        if len(group) < share:
            where = f"process {process}" if len(groups) > 1 else "this process"
            raise MoejaxError(_too_few(shape, share, group, where, too_late))
    devices = [device for group in groups.values() for device in group[:share]]
    return jax.make_mesh((shape.ep, shape.tp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def describe(mesh: Mesh) -> str:
    """Such as "ep=4,tp=2 on 8 virtual cpu devices" or "ep=2,tp=1 on 2 gpu devices (NVIDIA H100) of 2 processes"."""
    devices = list(mesh.devices.flat)
    cpu = devices[0].platform == "cpu"
    virtual = "virtual " if cpu and len(devices) > 1 else ""
    kind = "" if cpu else f" ({devices[0].device_kind})"
    processes = len({device.process_index for device in devices})
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    text = f"{axes} on {len(devices)} {virtual}{devices[0].platform} device{'s'[: len(devices) > 1]}{kind}"
    return text + (f" of {processes} processes" if processes > 1 else "")


def check_processes(shape: MeshShape, processes: int) -> None:
    """Raises MoejaxError unless `processes` can hold equal parts of the mesh."""
    if shape.size % processes:
        raise MoejaxError(
            f"mesh {shape} has {shape.size} devices, which {processes} processes cannot share equally; "
            f"make ep x tp a multiple of {processes} or start fewer processes"
        )


def _virtual_cpu_devices(shape: MeshShape, processes: int) -> bool:
    """Asks JAX for this process' part of the mesh; False when JAX has started and it is too late.

    Asked for also where accelerators may turn up: to find out starts JAX, and CPU devices beside them do no harm.
    """
    needed = min(-(-shape.size // processes), MAX_VIRTUAL_DEVICES)
    if needed <= _configured_cpu_devices():
        return True
    try:
        jax.config.update("jax_num_cpu_devices", needed)
    except RuntimeError:
        return False
    return True


def _configured_cpu_devices() -> int:
    """CPU devices by the user's own settings; jax_num_cpu_devices (-1: not set) overrides the XLA flag."""
    if (configured := jax.config.values["jax_num_cpu_devices"]) >= 0:
        return configured
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return int(flags[-1]) if flags else 1


def _devices_by_process(platform: str | None) -> dict[int, list[jax.Device]]:
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        wanted = platform or jax.config.values["jax_platforms"] or "of JAX's default"
        remedy = _INSTALL.get(wanted, "choose one of cpu, cuda, tpu")
        reason = str(error).splitlines()[0]
        raise MoejaxError(f"platform {wanted} is not available ({reason}); {remedy}, or use --platform cpu") from error
    groups: defaultdict[int, list[jax.Device]] = defaultdict(list)
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        groups[device.process_index].append(device)
    return groups


def _too_few(shape: MeshShape, share: int, group: list[jax.Device], where: str, too_late: bool) -> str:
    has = f"{len(group)} {group[0].platform} device{'s'[: len(group) > 1]}"
    needs = f"mesh {shape} needs {shape.size} devices" + (f", {share} in each process" if share < shape.size else "")
    if group[0].platform != "cpu":
        return (
            f"{needs}, but {where} has {has}; ask for a smaller mesh, or for virtual devices with --platform cpu "
            '(in Python: make_mesh(..., platform="cpu"))'
        )
    if too_late:
        return (
            f"{needs}, but JAX has already started with {has} in {where}; make the mesh before any other use of JAX, "
            f'or call jax.config.update("jax_num_cpu_devices", {share}) right after importing it'
        )
    return (
        f"{needs}, but {where} has {has}; at most {MAX_VIRTUAL_DEVICES} virtual ones are made, ask for a smaller mesh"
    )
