"""Which kernel an NVIDIA GPU runs, and that all of them compile for an H100 without one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from grouped_cases import check_marks, compile_all
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moejax.kernels import cuda, device, triton
from moejax.kernels.linear import linear
from moejax.planning.topologies import h100_mesh
from moejax.quantization.packed import PackedMatrix

ROOMY = ["NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA A100-SXM4-80GB", "NVIDIA B200"]
OTHERS = ["NVIDIA A10", "NVIDIA L40S", "NVIDIA GB10", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A6000"]


def mesh_of(kind):
    """One device that is only described."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    return AbstractMesh((1,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=device)


def trace(kind, rows=8, dtype=jnp.float32):
    """Of a product on a device of this kind, as text."""
    struct = jax.ShapeDtypeStruct

    def product(x, w, sizes):
        return cuda.products(x, w, sizes, transposed=False, out_dtype=dtype)

    mapped = jax.shard_map(product, mesh=mesh_of(kind), in_specs=P("ep"), out_specs=P("ep"))
    return str(jax.make_jaxpr(mapped)(struct((rows, 32), dtype), struct((2, 32, 512), dtype), struct((2,), jnp.int32)))


@pytest.mark.parametrize(("kinds", "programs"), [(ROOMY, 7 * 2), (OTHERS, 7 * 4)])
def test_large_tiles_run_where_shared_memory_is_large(kinds, programs):
    """Of 512 columns: 256 or 128 at once."""
    for kind in kinds:
        text = trace(kind, rows=512, dtype=jnp.bfloat16)
        assert f"grid=({programs},)" in text, kind


@pytest.mark.parametrize(("kind", "expected"), [("Tesla T4", "loop"), ("NVIDIA A100-SXM4-40GB", "triton")])
def test_before_ampere_no_kernel_runs(monkeypatch, kind, expected):
    """A mesh knows the kind of its devices; only a device that is at hand says how old that is."""
    capability = {"Tesla T4": "7.5", "NVIDIA A100-SXM4-40GB": "8.0"}[kind]
    present = SimpleNamespace(device_kind=kind, platform="gpu", compute_capability=capability)
    monkeypatch.setattr(device, "get_default_device", lambda: present)
    assert ("pallas_call" in trace(kind)) == (expected == "triton")
    x, dy, sizes = jnp.ones((8, 32)), jnp.ones((8, 64)), jnp.array([3, 4], jnp.int32)
    dw = jax.make_jaxpr(lambda *a: cuda.weight_gradient(*a, groups=2, out_dtype=jnp.float32))(x, dy, sizes)
    assert ("pallas_call" in str(dw)) == (expected == "triton")


def test_a_single_row_is_multiplied_among_sixteen():
    """As a product, which XLA would otherwise write out as a sum over copies of the weights."""
    mapped = jax.shard_map(linear, mesh=mesh_of(ROOMY[0]), in_specs=P(), out_specs=P())
    struct = jax.ShapeDtypeStruct
    for rows, padded in ((1, True), (2, False)):
        traced = jax.make_jaxpr(mapped)(struct((rows, 64), jnp.bfloat16), struct((64, 32), jnp.bfloat16))
        assert ("bf16[16,64]" in str(traced)) == padded
        assert traced.out_avals[0].shape == (rows, 32)


def test_marks_what_varies_in_shard_map(mesh):
    check_marks(mesh("ep=2,tp=2"), cuda.products, cuda.weight_gradient)


@pytest.mark.deviceless
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("dtype", "rows", "shape"),
    [
        (jnp.bfloat16, 4096, (1024, 1408)),
        (jnp.float16, 13, (1440, 1408)),
        (jnp.bfloat16, 64, (40, 72)),
        (jnp.float32, 4096, (1024, 1408)),
        (jnp.float32, 13, (40, 72)),
    ],
)
def test_compiles_for_an_h100(dtype, rows, shape):
    """A kernel each, and one that looks up tiles; no array wider than the operands: no dense expansion, no gather."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs JAX's CUDA plugin")
    programs = compile_all(h100_mesh("ep=4,tp=2"), cuda, rows, shape, dtype)
    for program, kernels in zip(programs, (2, 2, 1), strict=True):
        assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == kernels
        assert program.memory_analysis().temp_size_in_bytes < 8192 + 2 * (rows + 8) * max(shape) * dtype(0).itemsize


@pytest.mark.deviceless
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_matrices_compile_for_an_h100(dtype, transposed):
    """The dense matrices never exist; the rows may once more, the two values of each byte apart."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs JAX's CUDA plugin")
    mesh, struct = h100_mesh("ep=4,tp=2"), jax.ShapeDtypeStruct
    w = PackedMatrix(struct((16, 1408, 32, 16), jnp.uint8), struct((16, 1408, 32), jnp.uint8))
    x = struct((4 * 512, 1408 if transposed else 1024), dtype)

    def product(x, w, sizes):
        return triton.products(x, w, sizes, transposed=transposed, out_dtype=dtype)

    mapped = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    program = mapped.lower(x, w, struct((16,), jnp.int32)).compile()
    rows = 0 if transposed else 512 * 1024 * dtype(0).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 8192 + rows
