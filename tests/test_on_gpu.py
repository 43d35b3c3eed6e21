"""Every kernel on the GPU itself against float64, and a model's tokens against the CPU's; a GPU runs it by

    MOEJAX_TEST_PLATFORM=cuda python -m pytest -n 0 -m gpu

What the same setting makes of the rest of the suite: programs run on the GPU wherever one device is enough.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_cases import CASES as ATTEND
from attend_cases import SHAPES, inputs, sight
from grouped_cases import CASES, check
from moe_cases import normal, relative
from where import PLATFORM

from moejax.kernels import cuda, triton
from moejax.kernels.attention import triton as attention
from moejax.kernels.attention.reference import attend
from moejax.kernels.attention.sight import visible
from moejax.kernels.gated_matmul import silu_gated_matmul
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.quantization.mxfp4 import pack, unpack_host
from moejax.quantization.packed import PackedMatrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PLATFORM != "cuda", reason="runs where MOEJAX_TEST_PLATFORM=cuda"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 2**-8, jnp.float16: 2**-10}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 72), jnp.float32),
        ((512, 256), jnp.float32),
        ((40, 72), jnp.bfloat16),
        ((512, 256), jnp.bfloat16),
        ((96, 160), jnp.float16),
    ],
)
@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_grouped_products(rows, sizes, shape, dtype):
    check(cuda.products, cuda.weight_gradient, rows, sizes, shape=shape, dtype=dtype)


LARGE = {  # rows, rows of each group, inner and outer width
    "a token's experts": (8, [int(group % 8 == 5) for group in range(64)], (1024, 2048)),
    "a prompt": (4096, [64 + group % 7 - 3 for group in range(63)], (1024, 1408)),
    "long groups": (4096, [1000, 0, 17, 2500, 300], (1440, 1408)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", LARGE)
def test_grouped_matmul_of_real_sizes(case, dtype):
    """Values and gradients; the rows past the last group hold NaN."""
    rows, sizes, (inner, outer) = LARGE[case]
    rng = np.random.default_rng(0)
    x, w, dy = normal(rng, rows, inner), normal(rng, len(sizes), inner, outer), normal(rng, rows, outer)
    x, w, dy = (a.astype(dtype) for a in (x, w, dy))
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    exact = [np.asarray(a, np.float32).astype(np.float64) for a in (x, w, dy)]
    want = np.zeros((rows, outer)), np.zeros((rows, inner)), np.zeros(w.shape)
    for group, mine in enumerate(groups):
        want[0][mine], want[1][mine] = exact[0][mine] @ exact[1][group], exact[2][mine] @ exact[1][group].T
        want[2][group] = exact[0][mine].T @ exact[2][mine]
    past = np.arange(rows)[:, None] >= ends[-1]
    x, dy = jnp.where(past, jnp.nan, x), jnp.where(past, jnp.nan, dy)

    @jax.jit
    def run(x, w, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *pullback(dy)

    for name, got, expected in zip(("y", "dx", "dw"), run(x, w, dy, jnp.array(sizes, jnp.int32)), want, strict=True):
        assert relative(got.astype(jnp.float32), expected) < BOUNDS[dtype], name
        assert not np.asarray(got)[expected == 0].any(), name


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_block_of_columns_is_read_where_it_lies(dtype):
    rng = np.random.default_rng(0)
    x, w, sizes = normal(rng, 70, 200), normal(rng, 200, 3, 90), jnp.array([0, 50, 13], jnp.int32)
    x, w = x.astype(dtype), w.astype(dtype)
    options = {"transposed": False, "out_dtype": dtype}
    got = jax.jit(functools.partial(cuda.products, group_axis=1, **options))(x, w, sizes)
    want = jax.jit(functools.partial(triton.products, **options))(x, jnp.moveaxis(w, 1, 0), sizes)
    assert relative(got.astype(jnp.float32), want.astype(jnp.float32)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "sizes"), [(13, [3, 0, 2, 4]), (4, [0, 1, 2, 1]), (300, [130, 0, 1, 157]), (1, [0, 1, 0, 0])]
)
@pytest.mark.parametrize(("inner", "outer"), [(96, 24), (2880, 1440)])
def test_packed_matrices(rows, sizes, inner, outer, dtype):
    """Unpacked exactly, in both directions."""
    rng = np.random.default_rng(rows)
    blocks, scales = pack(rng.standard_normal((len(sizes), outer, inner), np.float32))
    dense = np.swapaxes(np.asarray(unpack_host(blocks, scales), np.float64), 1, 2)
    packed = PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales))
    for width, matrices, transposed in ((inner, dense, False), (outer, np.swapaxes(dense, 1, 2), True)):
        x = normal(rng, rows, width).astype(dtype)
        product = functools.partial(cuda.products, transposed=transposed, out_dtype=dtype)
        got = jax.jit(product)(x, packed, jnp.array(sizes, jnp.int32))
        chosen, exact = np.repeat(np.arange(len(sizes)), sizes), np.asarray(x, np.float32).astype(np.float64)
        want = np.zeros(got.shape)
        for row, group in enumerate(chosen):
            want[row] = exact[row] @ matrices[group]
        assert relative(got.astype(jnp.float32), want) < BOUNDS[dtype], f"transposed: {transposed}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [[3, 0, 2], [0, 300, 0], [130, 7, 150]])
def test_gated_product(sizes, dtype):
    rng = np.random.default_rng(0)
    rows, width, hidden = 300, 256, 96
    x, gate_up = normal(rng, rows, width), normal(rng, 3, width, 2, hidden, scale=width**-0.5)
    x, gate_up = x.at[sum(sizes) :].set(jnp.nan).astype(dtype), gate_up.astype(dtype)
    got = jax.jit(silu_gated_matmul)(x, gate_up, jnp.array(sizes, jnp.int32))
    a, b = (np.asarray(part, np.float32).astype(np.float64) for part in (x, gate_up))
    want = np.zeros((rows, hidden))
    for row, group in enumerate(np.repeat(np.arange(3), sizes)):
        gate, up = (a[row] @ b[group, :, half] for half in (0, 1))
        want[row] = gate / (1 + np.exp(-gate)) * up
    # Gate and up are rounded on their own before they are multiplied.
    assert relative(got.astype(jnp.float32), want) < 3 * BOUNDS[dtype]


WIDE = {  # what real models bring: grouped heads, decoding over a long cache, latents written out and as they are
    "prefill": (1, 1024, 1024, 16, 4, 128, 128),
    "decode": (4, 1, 4096, 64, 8, 64, 64),
    "wide heads": (1, 300, 700, 8, 4, 256, 256),
    "latent prefill": (1, 1024, 1024, 4, 4, 192, 128),
    "latent decode": (4, 1, 2048, 128, 1, 576, 576),
}
ATTENTION = [(name, rule, dtype) for name, rule in ATTEND for dtype in (jnp.float32, jnp.bfloat16)]
ATTENTION += [(name, {}, dtype) for name in WIDE for dtype in (jnp.float32, jnp.bfloat16)]
ATTENTION += [(name, {"window": 500, "sinks": True}, jnp.bfloat16) for name in WIDE]
ATTENTION += [("prefill", {}, jnp.float16)]


@pytest.mark.parametrize(("name", "rule", "dtype"), ATTENTION)
def test_attention(name, rule, dtype):
    shape = {**SHAPES, **WIDE}[name]
    queries, keys = sight(shape, rule)
    *operands, sinks = inputs(shape, dtype)
    sinks = sinks if rule.get("sinks") else None
    scale = shape[5] ** -0.5
    got, logs = jax.jit(functools.partial(attention.forward, scale=scale))(*operands, sinks, queries, keys)
    on_cpu = jax.device_put(([x.astype(jnp.float32) for x in operands], queries, keys), jax.devices("cpu")[0])
    (q, k, v), queries, keys = on_cpu
    seen = visible(queries, keys)
    sinks = None if sinks is None else jax.device_put(sinks.astype(jnp.float32), jax.devices("cpu")[0])
    want = jax.jit(functools.partial(attend, scale=scale))(q, k, v, seen, sinks=sinks)
    real = np.asarray(seen.any(-1))
    assert got.dtype == dtype
    assert np.isfinite(np.asarray(got, np.float32)).all() and np.isfinite(logs).all()
    # Powers are rounded before they meet the values.
    assert relative(np.asarray(got, np.float32)[real], np.asarray(want)[real]) < 2 * BOUNDS[dtype]


ON_GPU = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.mark.parametrize("prompts", [["Once upon a time"], ["The king said", "def main(", "1, 2, 3,"]])
def test_a_model_continues_as_on_the_cpu(prompts, run_cli):
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    command = ["moejax.generate", "--mesh", "ep=1,tp=1", "--dtype", "float32", "--json", *asked]
    runs = [
        run_cli([*command, "--platform", platform], env=env, timeout=300)
        for platform, env in (("cuda", ON_GPU), ("cpu", {}))
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    on_gpu, on_cpu = (json.loads(run.stdout) for run in runs)
    assert [out["tokens"] for out in on_gpu["outputs"]] == [out["tokens"] for out in on_cpu["outputs"]]


def test_a_model_is_verified(run_cli):
    run = run_cli(["moejax.verify", "--platform", "cuda", "--meshes", "ep=1,tp=1", "--json"], env=ON_GPU, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
