"""Which kernel an NVIDIA GPU runs, and that all of them compile for an H100 without one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from grouped_cases import check_marks, compile_all
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moejax.kernels import cuda, device, triton
from moejax.planning.topologies import h100_mesh
from moejax.quantization.packed import PackedMatrix

HOPPERS = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"]
OTHERS = ["NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA B200", "NVIDIA GB200", "NVIDIA GeForce RTX 4090", "cpu"]


def mesh_of(kind):
    """One device that is only described."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return AbstractMesh((1,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=device)


def kernel(kind, dtype, width=64, w=None):
    """Which kernel multiplies on a device of this kind, as a trace shows it."""
    struct = jax.ShapeDtypeStruct
    w = struct((2, 32, width), dtype) if w is None else w

    def product(x, w, sizes):
        return cuda.products(x, w, sizes, transposed=False, out_dtype=dtype)

    mapped = jax.shard_map(product, mesh=mesh_of(kind), in_specs=P("ep"), out_specs=P("ep"))
    traced = str(jax.make_jaxpr(mapped)(struct((8, 32), dtype), w, struct((2,), jnp.int32)))
    if "pallas_call" in traced:
        return "triton"
    return "hopper" if "wgmma" in traced else "loop"


@pytest.mark.parametrize("kind", HOPPERS)
def test_hoppers_run_their_own_kernel(kind):
    assert kernel(kind, jnp.bfloat16) == "hopper"


def test_what_the_hopper_kernel_does_not_take_runs_in_triton():
    assert kernel(HOPPERS[0], jnp.float32) == "triton"
    assert kernel(HOPPERS[0], jnp.bfloat16, width=40) == "triton"
    packed = PackedMatrix(jnp.zeros((2, 64, 1, 16), jnp.uint8), jnp.zeros((2, 64, 1), jnp.uint8))
    assert kernel(HOPPERS[0], jnp.bfloat16, w=packed) == "triton"


@pytest.mark.parametrize(("kind", "expected"), [("Tesla T4", "loop"), ("NVIDIA A100-SXM4-40GB", "triton")])
def test_before_ampere_no_kernel_runs(monkeypatch, kind, expected):
    """A mesh knows the kind of its devices; only a device that is at hand says how old that is."""
    capability = {"Tesla T4": "7.5", "NVIDIA A100-SXM4-40GB": "8.0"}[kind]
    present = SimpleNamespace(device_kind=kind, platform="gpu", compute_capability=capability)
    monkeypatch.setattr(device, "get_default_device", lambda: present)
    assert kernel(kind, jnp.float32) == expected
    x, dy, sizes = jnp.ones((8, 32)), jnp.ones((8, 64)), jnp.array([3, 4], jnp.int32)
    dw = jax.make_jaxpr(lambda *a: cuda.weight_gradient(*a, groups=2, out_dtype=jnp.float32))(x, dy, sizes)
    assert ("pallas_call" in str(dw)) == (expected == "triton")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_devices_run_triton(kind):
    assert kernel(kind, jnp.bfloat16) == "triton"


def test_marks_what_varies_in_shard_map(mesh):
    check_marks(mesh("ep=2,tp=2"), cuda.products, cuda.weight_gradient)


@pytest.mark.deviceless
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("dtype", "rows", "shape", "targets"),
    [
        (jnp.bfloat16, 4096, (1024, 1408), ["mosaic_gpu_v2", "mosaic_gpu_v2", "__gpu$xla.gpu.triton"]),
        (jnp.float16, 13, (1440, 1408), ["mosaic_gpu_v2", "mosaic_gpu_v2", "__gpu$xla.gpu.triton"]),
        (jnp.bfloat16, 64, (40, 72), ["__gpu$xla.gpu.triton"] * 3),
        (jnp.float32, 4096, (1024, 1408), ["__gpu$xla.gpu.triton"] * 3),
        (jnp.float32, 13, (40, 72), ["__gpu$xla.gpu.triton"] * 3),
    ],
)
def test_compiles_for_an_h100(dtype, rows, shape, targets):
    """One kernel each, and no array wider than the operands: no dense expansion, no gather of weights."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs JAX's CUDA plugin")
    programs = compile_all(h100_mesh("ep=4,tp=2"), cuda, rows, shape, dtype)
    for program, target in zip(programs, targets, strict=True):
        assert program.as_text().count(f'custom_call_target="{target}"') == 1
        assert program.memory_analysis().temp_size_in_bytes < 8192 + 2 * (rows + 8) * max(shape) * dtype(0).itemsize


@pytest.mark.deviceless
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_matrices_compile_for_an_h100(dtype, transposed):
    """The dense matrices never exist."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs JAX's CUDA plugin")
    mesh, struct = h100_mesh("ep=4,tp=2"), jax.ShapeDtypeStruct
    w = PackedMatrix(struct((16, 1408, 32, 16), jnp.uint8), struct((16, 1408, 32), jnp.uint8))
    x = struct((4 * 512, 1408 if transposed else 1024), dtype)

    def product(x, w, sizes):
        return triton.products(x, w, sizes, transposed=transposed, out_dtype=dtype)

    mapped = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    program = mapped.lower(x, w, struct((16,), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8192
