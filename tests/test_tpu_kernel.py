"""megablox behind its wrapper, in Pallas' interpreter, against a loop over rows; its programs compiled for a TPU."""

import functools

import jax.numpy as jnp
import pytest
from grouped_cases import CASES, check, check_marks, compile_all, product_precisions

from moejax.kernels import tpu
from moejax.planning.topologies import tpu_mesh
from moejax.quantization.packed import PackedMatrix

products = functools.partial(tpu.products, interpret=True)
weight_gradient = functools.partial(tpu.weight_gradient, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "sizes"), CASES)
def test_equals_a_loop(rows, sizes):
    check(products, weight_gradient, rows, sizes)


def test_bfloat16_is_accumulated_in_float32():
    check(products, weight_gradient, 13, [3, 0, 2, 4], shape=(520, 136), dtype=jnp.bfloat16)


def test_marks_what_varies_in_shard_map(mesh):
    check_marks(mesh("ep=2,tp=2"), tpu.products, tpu.weight_gradient)


def test_float32_is_not_rounded_to_fewer_bits():
    assert product_precisions(tpu.products, tpu.weight_gradient) == {"HIGHEST"}


def test_what_it_takes():
    x, w = jnp.zeros((8, 32)), jnp.zeros((2, 32, 5))
    assert tpu.supports(x, w)
    assert tpu.supports(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert not tpu.supports(x.astype(jnp.float16), w.astype(jnp.float16))
    assert not tpu.supports(x.astype(jnp.bfloat16), w)
    packed = PackedMatrix(jnp.zeros((2, 5, 1, 16), jnp.uint8), jnp.zeros((2, 5, 1), jnp.uint8))
    assert not tpu.supports(x, packed)


@pytest.mark.deviceless
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "shape"), [(4096, (1024, 1408)), (13, (1024, 1440)), (64, (40, 72))])
def test_compiles_for_a_tpu(rows, shape, dtype):
    pytest.importorskip("libtpu", reason="needs libtpu")
    for program in compile_all(tpu_mesh("ep=4,tp=2"), tpu, rows, shape, dtype):
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
