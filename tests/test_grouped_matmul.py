"""grouped_matmul against a loop over rows: values and both gradients; packed matrices against the same dense ones.

All of it by what CPUs run and by XLA alone.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import by_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from moe_cases import compiled, normal, relative

from moejax.kernels import native
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.kernels.tile_loop import LARGEST_TILE
from moejax.quantization.mxfp4 import pack, unpack_host
from moejax.quantization.packed import PackedMatrix

INNER, OUTER = 5, 7


@pytest.fixture(params=["native", "tile loop"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "tile loop":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("no C++ compiler here")
    for function in (with_gradients, with_input_gradient):
        function.clear_cache()  # what was traced for the other one


@compiled
def with_gradients(x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pullback(dy)


def check(rows, sizes, garbage=0.0):
    rng = np.random.default_rng(rows)
    x, w, dy = normal(rng, rows, INNER), normal(rng, len(sizes), INNER, OUTER), normal(rng, rows, OUTER)
    past = np.arange(rows)[:, None] >= sum(sizes)
    want = by_rows(x, w, sizes, dy)
    x, dy = jnp.where(past, garbage, x), jnp.where(past, garbage, dy)
    got = with_gradients(x, w, jnp.array(sizes, jnp.int32), dy)
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert relative(a, b) < 1e-5, name
        assert not np.asarray(a)[b == 0].any(), f"{name} is not exactly zero where nothing contributes"


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (12, [3, 0, 5, 4]),
        (12, [0, 0, 12, 0]),
        (12, [12, 0, 0, 0]),
        (12, [0, 0, 0, 0]),
        (1, [0, 1]),
        (9, [9]),
        (3, [1, 0, 0, 0, 1, 0, 0, 0, 0]),
        (2 * LARGEST_TILE + 3, [LARGEST_TILE + 1, LARGEST_TILE - 1, 0]),
        (6 * LARGEST_TILE, [5 * LARGEST_TILE + 1, 0, 1]),
    ],
)
def test_equals_a_loop(rows, sizes):
    check(rows, sizes)


@pytest.mark.parametrize(("first", "sizes"), [(0, [3, 0]), (1, [2, 5]), (2, [1, 4]), (0, [2, 0, 1, 3])])
def test_a_slice_of_the_groups_is_named_and_not_cut_out(first, sizes):
    rng = np.random.default_rng(first)
    x, w, dy = normal(rng, 9, INNER), normal(rng, 4, INNER, OUTER), normal(rng, 9, OUTER)
    want = by_rows(x, w, np.pad(sizes, (first, 4 - first - len(sizes))), dy)
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), first), x, w)
    for name, a, b in zip(("y", "dx", "dw"), (y, *pullback(dy)), want, strict=True):
        assert relative(a, b) < 1e-5, name


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan, 3e38])
def test_rows_past_the_last_group_may_hold_anything(garbage):
    check(13, [3, 0, 2, 4], garbage)


def test_a_foreign_row_does_not_reach_its_neighbours():
    """Tiles reach into the next group's rows; what is there, inf included, stays there."""
    x = jnp.ones((8, INNER)).at[3].set(jnp.inf)
    w = jnp.ones((2, INNER, OUTER))
    y, dx, dw = with_gradients(x, w, jnp.array([3, 5], jnp.int32), jnp.ones((8, OUTER)))
    assert np.isfinite(np.delete(y, 3, 0)).all()
    assert np.isfinite(dx).all()
    assert np.isfinite(dw[0]).all() and np.isinf(dw[1]).all()


def test_no_rows():
    x, w, sizes = jnp.zeros((0, INNER)), jnp.ones((3, INNER, OUTER)), jnp.zeros(3, jnp.int32)
    y, dx, dw = with_gradients(x, w, sizes, jnp.zeros((0, OUTER)))
    assert y.shape == (0, OUTER) and dx.shape == x.shape
    assert not np.asarray(dw).any()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_group_sizes(data):
    rows, groups = data.draw(st.sampled_from([(40, 4), (7, 5)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
    check(rows, [b - a for a, b in zip([0, *cuts], cuts, strict=False)])


def test_bfloat16_is_accumulated_in_float32():
    rng = np.random.default_rng(0)
    x, w = normal(rng, 6, 512).astype(jnp.bfloat16), normal(rng, 2, 512, 3).astype(jnp.bfloat16)
    y = compiled(grouped_matmul)(x, w, jnp.array([2, 4], jnp.int32))
    assert y.dtype == jnp.bfloat16
    want = by_rows(x, w, [2, 4], jnp.zeros((6, 3)))[0]
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)


def packed_stack(groups, inner, outer, seed=0) -> tuple[PackedMatrix, jax.Array]:
    """Packed matrices and the dense ones they stand for."""
    blocks, scales = pack(np.random.default_rng(seed).standard_normal((groups, outer, inner)))
    dense = jnp.swapaxes(jnp.asarray(unpack_host(blocks, scales)), 1, 2)
    return PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales)), dense


@compiled
def with_input_gradient(x, w, sizes, dy):
    y, pullback = jax.vjp(lambda x: grouped_matmul(x, w, sizes), x)
    return y, *pullback(dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "sizes"), [(4, [1, 0, 2, 1]), (12, [3, 0, 5, 2]), (3, [0, 0, 0, 0]), (150, [130, 5, 0, 15])]
)
def test_packed_matrices_are_their_dense_ones(dtype, rows, sizes):
    """Sums may run in the order of the bytes, which is not that of the dense matrix."""
    rng = np.random.default_rng(0)
    packed, dense = packed_stack(4, 64, 24)
    x, dy = normal(rng, rows, 64).astype(dtype), normal(rng, rows, 24).astype(dtype)
    got = with_input_gradient(x, packed, jnp.array(sizes, jnp.int32), dy)
    want = with_input_gradient(x, dense.astype(dtype), jnp.array(sizes, jnp.int32), dy)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert relative(a.astype(jnp.float32), b.astype(jnp.float32)) < (1e-6 if dtype == jnp.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_matrices_are_unpacked_exactly(dtype):
    """Rows with a single 1 give the matrices' own rows back, in a product of few rows and in one of many."""
    packed, dense = packed_stack(2, 64, 24)
    rows = jnp.concatenate([jnp.eye(64, dtype=dtype), jnp.eye(3, 64, 5, dtype=dtype)])
    y, _ = with_input_gradient(rows, packed, jnp.array([64, 3], jnp.int32), jnp.ones((67, 24), dtype))
    np.testing.assert_array_equal(y, jnp.concatenate([dense[0], dense[1, 5:8]]).astype(dtype))


def test_packed_without_rows():
    packed, _ = packed_stack(3, 32, 5)
    assert grouped_matmul(jnp.zeros((0, 32)), packed, jnp.zeros(3, jnp.int32)).shape == (0, 5)


def test_packed_matrices_are_not_trained():
    packed, _ = packed_stack(2, 32, 5)
    x, sizes = jnp.ones((3, 32)), jnp.array([1, 2], jnp.int32)
    with pytest.raises(TypeError, match="got uint8"):
        jax.grad(lambda w: grouped_matmul(x, w, sizes).sum())(packed)
    _, pullback = jax.vjp(lambda w: grouped_matmul(x, w, sizes), packed)
    (dw,) = pullback(jnp.ones((3, 5)))
    assert {leaf.dtype for leaf in jax.tree.leaves(dw)} == {jax.dtypes.float0}


def test_the_dense_stack_never_exists():
    """Of all 32 matrices in float32, the program holds two at a time."""
    packed, _ = packed_stack(32, 64, 96)
    x, dy, sizes = jnp.ones((40, 64)), jnp.ones((40, 96)), jnp.full(32, 1, jnp.int32)
    program = with_input_gradient.lower(x, packed, sizes, dy).compile()
    matrix = 64 * 96 * 4
    assert program.memory_analysis().temp_size_in_bytes < 4 * matrix
    arrays = re.findall(r"\b(?:f32|bf16|u16|u32)\[([\d,]+)\]", program.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in arrays) == 64 * 96


@pytest.mark.parametrize("packs", [False, True])
def test_gradients_in_shard_map(mesh, packs):
    """Groups cut over ep and outputs over tp: each device's share of dx is summed over tp, where x is the same."""
    packed, dense = packed_stack(4, 32, 6)
    rng = np.random.default_rng(0)
    x, dy, sizes = normal(rng, 8, 32), normal(rng, 8, 6), jnp.array([3, 1, 0, 4], jnp.int32)
    w = packed if packs else jnp.swapaxes(dense, 1, 2).astype(jnp.float32)
    cut = P("ep", "tp")

    def product(x, w, sizes):
        return grouped_matmul(x, w if packs else jnp.swapaxes(w, 1, 2), sizes)

    mapped = jax.shard_map(product, mesh=mesh("ep=2,tp=2"), in_specs=(P("ep"), cut, P("ep")), out_specs=cut)
    y, pullback = compiled(lambda x: jax.vjp(lambda x: mapped(x, w, sizes), x))(x)
    want, dx_want = with_input_gradient(x, dense.astype(jnp.float32), sizes, dy)
    assert relative(y, want) < 1e-6
    assert relative(compiled(pullback)(dy)[0], dx_want) < 1e-6
