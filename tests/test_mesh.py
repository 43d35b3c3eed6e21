"""Mesh specs, the mesh that fits no device, and virtual CPU devices in processes of their own."""

import jax
import pytest

from moejax.errors import MoejaxError
from moejax.mesh import MeshShape, check_processes, default_shape, describe, make_mesh, parse_mesh


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("ep=4,tp=2", (4, 2)), ("tp=2,ep=4", (4, 2)), ("ep=3", (3, 1)), ("tp=8", (1, 8)), (" ep = 2 , tp=1", (2, 1))],
)
def test_a_spec_names_its_axes_in_any_order(spec: str, shape: tuple[int, int]):
    assert parse_mesh(spec) == MeshShape(*shape)
    assert parse_mesh(str(parse_mesh(spec))) == MeshShape(*shape)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", 'the mesh is empty; write it as "ep=4,tp=2"'),
        ("ep4", 'mesh "ep4": "ep4" is not of the form AXIS=SIZE; write it as "ep=4,tp=2"'),
        ("ep=4,", 'mesh "ep=4,": "" is not of the form AXIS=SIZE; write it as "ep=4,tp=2"'),
        ("dp=2,ep=4", 'mesh "dp=2,ep=4": unknown axis "dp"; the axes are ep (experts) and tp (tensors)'),
        ("ep=2,ep=4", 'mesh "ep=2,ep=4": axis ep is given twice; give it once'),
        ("ep=0", 'mesh "ep=0": axis ep has size 0; it must be at least 1'),
        ("tp=-2", 'mesh "tp=-2": axis tp has size -2; it must be at least 1'),
        ("ep=four", 'mesh "ep=four": the size "four" of axis ep is not a whole number'),
        ("ep=2.5", 'mesh "ep=2.5": the size "2.5" of axis ep is not a whole number'),
        ("ep=", 'mesh "ep=": the size "" of axis ep is not a whole number'),
    ],
)
def test_a_bad_spec_is_refused(spec: str, message: str):
    with pytest.raises(MoejaxError) as caught:
        parse_mesh(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("devices", "experts", "shape"),
    [
        (8, 8, (8, 1)),
        (8, 6, (4, 2)),
        (8, 1, (1, 8)),
        (6, 4, (3, 2)),
        (8, None, (8, 1)),
        (1, 64, (1, 1)),
        (7, 6, (1, 7)),
    ],
)
def test_the_default_takes_all_devices(devices: int, experts: int | None, shape: tuple[int, int]):
    assert default_shape(devices, experts) == MeshShape(*shape)


def test_tp_is_innermost_and_both_axes_are_auto():
    mesh = make_mesh("tp=2,ep=3")
    assert dict(mesh.shape) == {"ep": 3, "tp": 2}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3, 4, 5]
    assert dict(make_mesh(num_experts=6).shape) == {"ep": 4, "tp": 2}


@pytest.mark.parametrize(
    ("spec", "text"), [("ep=4,tp=2", "ep=4,tp=2 on 8 virtual cpu devices"), ("ep=1", "ep=1,tp=1 on 1 cpu device")]
)
def test_describe(spec: str, text: str):
    assert describe(make_mesh(spec)) == text


def test_a_mesh_that_does_not_fit_a_started_process_is_refused():
    jax.devices()
    with pytest.raises(MoejaxError) as caught:
        make_mesh("ep=16")
    assert str(caught.value) == (
        "mesh ep=16,tp=1 needs 16 devices, but JAX has already started with 8 cpu devices in this process; make the "
        'mesh before any other use of JAX, or call jax.config.update("jax_num_cpu_devices", 16) right after importing '
        "it"
    )


def test_a_platform_that_is_not_there_is_refused_with_what_to_install():
    with pytest.raises(MoejaxError, match="platform cuda is not available") as caught:
        make_mesh("ep=2", platform="cuda")
    assert 'pip install "moejax[cuda12]"' in str(caught.value)
    assert str(caught.value).endswith("or use --platform cpu")
    assert "\n" not in str(caught.value)


def test_accelerators_fewer_than_asked_are_refused_with_the_way_to_virtual_devices(monkeypatch: pytest.MonkeyPatch):
    class Gpu:
        platform, process_index, id = "gpu", 0, 0

    monkeypatch.setattr(jax, "devices", lambda platform: [Gpu()])
    with pytest.raises(MoejaxError) as caught:
        make_mesh("ep=4,tp=2")
    assert str(caught.value) == (
        "mesh ep=4,tp=2 needs 8 devices, but this process has 1 gpu device; ask for a smaller mesh, or for virtual "
        'devices with --platform cpu (in Python: make_mesh(..., platform="cpu"))'
    )


@pytest.mark.parametrize("shape", [MeshShape(3, 1), MeshShape(1, 1)])
def test_processes_share_a_mesh_equally_or_not_at_all(shape: MeshShape):
    with pytest.raises(MoejaxError) as caught:
        check_processes(shape, 2)
    assert str(caught.value) == (
        f"mesh {shape} has {shape.size} devices, which 2 processes cannot share equally; make ep x tp a multiple of 2 "
        "or start fewer processes"
    )


FRESH = """
import sys, jax
from moejax.mesh import describe, make_mesh
from moejax.errors import MoejaxError
for spec in sys.argv[1:]:
    try:
        mesh = make_mesh(None if spec == "default" else spec)
        print(describe(mesh), "of", jax.device_count())
    except MoejaxError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("specs", "env", "lines"),
    [
        (
            ["ep=4,tp=2", "ep=2"],
            {},
            ["ep=4,tp=2 on 8 virtual cpu devices of 8", "ep=2,tp=1 on 2 virtual cpu devices of 8"],
        ),
        (
            ["default", "ep=2"],
            {},
            [
                "ep=1,tp=1 on 1 cpu device of 1",
                "mesh ep=2,tp=1 needs 2 devices, but JAX has already started with 1 cpu device in this process; make "
                'the mesh before any other use of JAX, or call jax.config.update("jax_num_cpu_devices", 2) right after '
                "importing it",
            ],
        ),
        (["ep=4"], {"JAX_NUM_CPU_DEVICES": "6"}, ["ep=4,tp=1 on 4 virtual cpu devices of 6"]),
        (["ep=4"], {"JAX_NUM_CPU_DEVICES": "2"}, ["ep=4,tp=1 on 4 virtual cpu devices of 4"]),
        (
            ["ep=4"],
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"},
            ["ep=4,tp=1 on 4 virtual cpu devices of 6"],
        ),
        (
            ["ep=4"],
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            ["ep=4,tp=1 on 4 virtual cpu devices of 4"],
        ),
        (
            ["ep=100000"],
            {},
            [
                "mesh ep=100000,tp=1 needs 100000 devices, but this process has 512 cpu devices; at most 512 virtual "
                "ones are made, ask for a smaller mesh"
            ],
        ),
    ],
)
def test_virtual_cpu_devices_in_a_fresh_process(specs: list[str], env: dict[str, str], lines: list[str], run_python):
    done = run_python([FRESH, *specs], env=env)
    assert done.stdout.splitlines() == lines, done.stderr
