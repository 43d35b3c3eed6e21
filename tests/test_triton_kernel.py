"""The Triton kernels in Pallas' interpreter against a loop over rows; packed matrices against the same dense ones."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from grouped_cases import CASES, check, check_marks, product_precisions
from moe_cases import compiled, normal, relative

from moejax.kernels import triton
from moejax.quantization.mxfp4 import pack, unpack_host
from moejax.quantization.packed import PackedMatrix

products = functools.partial(triton.products, interpret=True)
weight_gradient = functools.partial(triton.weight_gradient, interpret=True)


@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_equals_a_loop(rows, sizes):
    check(products, weight_gradient, rows, sizes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_sixteen_bits_are_accumulated_in_float32(dtype):
    check(products, weight_gradient, 300, [130, 0, 1, 157], shape=(520, 136), dtype=dtype)


def test_a_block_of_columns_is_read_where_it_lies():
    """The groups on the middle axis: the same products as with the blocks cut out."""
    rng = np.random.default_rng(0)
    x, w, sizes = normal(rng, 7, 20), normal(rng, 20, 3, 9), jnp.array([0, 5, 1], jnp.int32)
    options = {"transposed": False, "out_dtype": jnp.float32}
    got = compiled(functools.partial(products, group_axis=1, **options))(x, w, sizes)
    want = compiled(functools.partial(products, **options))(x, jnp.moveaxis(w, 1, 0), sizes)
    np.testing.assert_array_equal(got, want)


def packed_and_dense(groups, dtype, seed=0):
    """The same random matrices `[groups, 96, 24]` both ways."""
    blocks, scales = pack(np.random.default_rng(seed).standard_normal((groups, 24, 96)))
    dense = jnp.swapaxes(jnp.asarray(unpack_host(blocks, scales)), 1, 2).astype(dtype)
    return PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales)), dense


@pytest.mark.parametrize(
    ("dtype", "rows", "sizes"), [(jnp.float32, 13, [3, 0, 2, 4]), (jnp.bfloat16, 150, [130, 5, 0, 15])]
)
def test_packed_matrices_give_the_products_of_dense_ones(dtype, rows, sizes):
    rng = np.random.default_rng(rows)
    packed, dense = packed_and_dense(4, dtype)
    group_sizes = jnp.array(sizes, jnp.int32)
    for width, transposed in ((96, False), (24, True)):
        x = normal(rng, rows, width).astype(dtype)
        product = compiled(functools.partial(products, transposed=transposed, out_dtype=dtype))
        got, want = (product(x, w, group_sizes).astype(jnp.float32) for w in (packed, dense))
        assert relative(got, want) < (1e-6 if dtype == jnp.float32 else 2**-8)
        assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_matrices_are_unpacked_exactly(transposed):
    """Rows of the identity read a matrix entry by entry."""
    packed, dense = packed_and_dense(1, jnp.float32)
    width = 24 if transposed else 96
    product = compiled(functools.partial(products, transposed=transposed, out_dtype=jnp.float32))
    got = product(jnp.eye(width), packed, jnp.array([width], jnp.int32))
    np.testing.assert_array_equal(got, dense[0].T if transposed else dense[0])


def test_marks_what_varies_in_shard_map(mesh):
    check_marks(mesh("ep=2,tp=2"), triton.products, triton.weight_gradient)


def test_float32_is_not_rounded_to_fewer_bits():
    assert product_precisions(triton.products, triton.weight_gradient) == {"HIGHEST"}
