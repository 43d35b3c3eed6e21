"""The native kernel's products and weight gradients on every instruction set that the machine has, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from moe_cases import normal

from moejax.kernels.native import available, library, products, weight_gradient
from moejax.quantization.mxfp4 import unpack_host
from moejax.quantization.packed import PackedMatrix
from moejax.sharding import varying_as

CASES = {
    # rows, inputs, outputs, sizes
    "even": (16, 64, 128, [4, 4, 8]),
    "odd": (50, 65, 71, [3, 0, 40, 5]),
    "one row": (1, 33, 130, [0, 1]),
    "one group": (13, 96, 64, [13]),
    "all in one of three": (9, 31, 67, [0, 9, 0]),
    "no rows in any group": (6, 5, 7, [0, 0]),
    "no rows": (0, 8, 8, [0, 0]),
    "no inputs": (8, 0, 5, [4, 4]),
    "one input, one output": (7, 1, 1, [3, 2]),
    "several blocks of rows and slices of depth": (300, 600, 80, [290, 3]),
    "depth past one slice of few rows": (5, 2100, 66, [2, 3]),
    "few rows of wide matrices": (4, 300, 4500, [1, 2]),
}


DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@pytest.fixture(autouse=True)
def kernel_is_available():
    assert available()


@partial(jax.jit, static_argnames="out")
def everything(x, w, dy, sizes, out=jnp.float32):
    """By instruction set: the four ways in which a product is asked for, and the weight gradient."""

    def of(isa):
        product = partial(products, out_dtype=out, isa=isa)
        return (
            product(x, w, sizes, transposed=False),
            product(x, jnp.swapaxes(w, 1, 2), sizes, transposed=True),
            product(x, jnp.swapaxes(w, 0, 1), sizes, transposed=False, group_axis=1),
            product(dy, w, sizes, transposed=True),
            weight_gradient(x, dy, sizes, groups=w.shape[0], out_dtype=out, isa=isa),
        )

    return {name: of(isa) for isa, name in enumerate(library.instruction_sets())}


def arrays(rows, inputs, outputs, groups, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    return [normal(rng, *shape).astype(dtype) for shape in shapes]


def by_group(x, w, sizes):
    """x[M, K] and w[G, K, N] to y[M, N]."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, start = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[group]
        start += size
    return y


def gradient_by_group(x, dy, sizes):
    """x[M, K] and dy[M, N] to dw[G, K, N]."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    ends = np.cumsum(sizes)
    return np.stack([x[end - size : end].T @ dy[end - size : end] for size, end in zip(sizes, ends, strict=True)])


def check(results, x, w, dy, sizes):
    """Sums of bfloat16 products round as those of float32 do: both are accumulated in float32."""
    y, dx = by_group(x, w, sizes), by_group(dy, np.swapaxes(w, 1, 2), sizes)
    want = y, y, y, dx, gradient_by_group(x, dy, sizes)
    for isa, got in results.items():
        for name, a, b in zip(("y", "from transposed", "from columns", "dx", "dw"), got, want, strict=True):
            error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
            assert error <= 2e-6 * np.abs(b).max(initial=0), (isa, name)


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_groups(case, dtype):
    rows, inputs, outputs, sizes = CASES[case]
    x, w, dy = arrays(rows, inputs, outputs, len(sizes), dtype)
    check(everything(x, w, dy, jnp.array(sizes, jnp.int32)), x, w, dy, sizes)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_and_group_sizes(data):
    rows, inputs, outputs = (data.draw(st.integers(0, top)) for top in (70, 150, 150))
    groups = data.draw(st.integers(1, 5))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
    sizes = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    x, w, dy = arrays(rows, inputs, outputs, groups, data.draw(st.sampled_from([jnp.float32, jnp.bfloat16])))
    check(everything(x, w, dy, jnp.array(sizes, jnp.int32)), x, w, dy, sizes)


def test_results_in_bfloat16_are_the_rounded_sums():
    x, w, dy = arrays(20, 40, 50, 2, jnp.bfloat16)
    sizes = jnp.array([3, 15], jnp.int32)
    exact = everything(x, w, dy, sizes)
    for isa, results in everything(x, w, dy, sizes, out=jnp.bfloat16).items():
        for narrow, wide in zip(results, exact[isa], strict=True):
            assert narrow.dtype == jnp.bfloat16
            np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@DTYPES
@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_foreign_rows_and_rows_past_the_end_may_hold_anything(garbage, dtype):
    """Group 1's rows and all past the last group are garbage; an odd depth and an odd count of rows have no partner."""
    x, w, dy = arrays(40, 31, 67, 3, dtype)
    clean = everything(x, w, dy, jnp.array([13, 5, 17], jnp.int32))
    x, dy = (a.at[13:18].set(garbage).at[35:].set(garbage) for a in (x, dy))
    for isa, (*ys, dw) in everything(x, w, dy, jnp.array([13, 5, 17], jnp.int32)).items():
        *wanted, dw_wanted = clean[isa]
        for y, want in zip(ys, wanted, strict=True):
            assert not np.isfinite(y[13:18]).any()
            np.testing.assert_array_equal(np.delete(y, np.s_[13:18], 0), np.delete(want, np.s_[13:18], 0))
        assert not np.isfinite(dw[1]).any()
        np.testing.assert_array_equal(dw[::2], dw_wanted[::2])


def test_sizes_that_exceed_the_rows_read_nothing_outside():
    """A router's mistake must not become a crash: what does not fit is left out."""
    x, w, dy = arrays(5, 8, 8, 3, jnp.float32)
    check(everything(x, w, dy, jnp.array([3, 4, 1 << 30], jnp.int32)), x, w, dy, [3, 2, 0])
    check(everything(x, w, dy, jnp.array([-7, 4, -1], jnp.int32)), x, w, dy, [0, 4, 0])


@jax.jit
def packed_products(x, w, sizes):
    product = partial(products, x, w, sizes, transposed=False, out_dtype=jnp.float32)
    return {name: product(isa=isa) for isa, name in enumerate(library.instruction_sets())}


@DTYPES
@pytest.mark.parametrize("sizes", [[1, 0, 2, 1], [130, 5, 0, 15]])
def test_packed_matrices(sizes, dtype):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (4, 70, 3, 16), np.uint8), rng.integers(110, 140, (4, 70, 3), np.uint8)
    dense = np.swapaxes(unpack_host(blocks, scales), 1, 2)
    x = normal(rng, sum(sizes) + 1, 96).astype(dtype)
    want = by_group(x, dense, sizes)
    packed = PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales))
    for isa, y in packed_products(x, packed, jnp.array(sizes, jnp.int32)).items():
        assert np.abs(y - want).max() < 1e-6 * np.abs(want).max(), isa


def test_every_code_under_every_scale_that_keeps_it_finite():
    """Each output is one block of all codes; rows of the identity read its values one by one."""
    codes = np.arange(16, dtype=np.uint8)
    scales = np.arange(253, dtype=np.uint8)
    blocks = np.broadcast_to(codes | codes[::-1] << 4, (253, 16))
    dense = unpack_host(blocks[:, None], scales[:, None]).astype(np.float64)
    assert np.isfinite(dense).all()
    packed = PackedMatrix(jnp.asarray(blocks[None, :, None]), jnp.asarray(scales[None, :, None]))
    want = np.where(np.abs(dense.T) < 2.0**-126, 0, dense.T)  # XLA's threads flush subnormal floats
    for isa, y in packed_products(jnp.eye(32), packed, jnp.array([32], jnp.int32)).items():
        np.testing.assert_array_equal(y, want, isa)


def test_packed_values_past_the_largest_are_infinite():
    blocks, scales = np.full((1, 3, 1, 16), 0x77, np.uint8), np.array([[[253], [254], [255]]], np.uint8)
    packed = PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales))
    for isa, y in packed_products(jnp.ones((1, 32)), packed, jnp.array([1], jnp.int32)).items():
        assert np.isposinf(y).all(), isa


@DTYPES
def test_eight_devices_at_once_in_a_loop(mesh, dtype):
    """Each device's calls, large enough to be shared, meet the others' on fewer cores; each round feeds the next."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, 512, 128).astype(dtype), (normal(rng, 8, 128, 128) / 11).astype(dtype)
    sizes = rng.multinomial(60, [0.25] * 4, size=2).reshape(-1).astype(np.int32)  # of the four groups of each ep rank

    def rounds(x, w, sizes):
        def step(state):
            i, x = state
            y = products(x, w, sizes, transposed=False, out_dtype=dtype)
            dw = weight_gradient(x, y, sizes, groups=w.shape[0], out_dtype=dtype)
            return i + 1, products(y, dw / jnp.maximum(jnp.abs(dw).max(), 1), sizes, transposed=True, out_dtype=dtype)

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (jnp.int32(0), varying_as(x, x, w, sizes)))[1]

    cut = P(("ep", "tp"))
    mapped = jax.shard_map(rounds, mesh=mesh("ep=2,tp=4"), in_specs=(cut, P("ep"), P("ep")), out_specs=cut)
    got = jax.jit(mapped)(x, w, jnp.asarray(sizes))
    alone = jax.jit(rounds)
    for device in range(8):
        rows, groups = slice(64 * device, 64 * device + 64), slice(4 * (device // 4), 4 * (device // 4) + 4)
        np.testing.assert_array_equal(got[rows], alone(x[rows], w[groups], jnp.asarray(sizes[groups])))


@DTYPES
def test_results_do_not_depend_on_threads(dtype):
    """Whichever ends last adds up what the tasks of a cut depth leave."""
    x, w, _ = arrays(1, 2048, 1024, 1, dtype)
    run = jax.jit(lambda: products(x, w, jnp.array([1], jnp.int32), transposed=False, out_dtype=jnp.float32))
    first = np.asarray(run())
    assert all(np.array_equal(run(), first) for _ in range(50))
