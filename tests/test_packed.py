"""PackedMatrix stands for a dense array: its shape, its groups, its reshape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.quantization.mxfp4 import pack, unpack_host
from moejax.quantization.packed import PackedMatrix, packed_width


@pytest.fixture
def gate_up() -> tuple[PackedMatrix, np.ndarray]:
    """[E, D, 2, F] and its packed form."""
    blocks, scales = pack(np.random.default_rng(0).standard_normal((3, 2, 5, 64)))
    return PackedMatrix(jnp.asarray(blocks), jnp.asarray(scales)), np.moveaxis(unpack_host(blocks, scales), -1, 1)


@pytest.mark.parametrize(
    ("width", "tp", "want"), [(2880, 1, 2880), (2880, 2, 2880), (2880, 4, 2944), (2880, 8, 3072), (1, 2, 64)]
)
def test_widths_that_devices_can_share(width, tp, want):
    assert packed_width(width, tp) == want


def test_stands_for_its_dense_array(gate_up):
    packed, dense = gate_up
    assert packed.shape == dense.shape == (3, 64, 2, 5)
    for group in range(3):
        assert packed[group].dtype == jnp.bfloat16
        np.testing.assert_array_equal(packed[group], dense[group])
        np.testing.assert_array_equal(packed.dense(jnp.int32(group), jnp.float32), dense[group].astype(np.float32))


def test_reshapes_as_its_dense_array(gate_up):
    packed, dense = gate_up
    flat = packed.reshape(3, 64, 10)
    assert flat.shape == (3, 64, 10)
    np.testing.assert_array_equal(flat[1], dense.reshape(3, 64, 10)[1])
    assert flat.reshape(*packed.shape).blocks.shape == packed.blocks.shape
    with pytest.raises(ValueError, match=r"packed \(3, 64, 2, 5\) cannot become \(3, 128, 5\): the first two axes"):
        packed.reshape(3, 128, 5)


def test_padding_with_zeros_is_exact(gate_up):
    packed, dense = gate_up
    widths = [(0, 1), (0, 0), (0, 3), (0, 1)]
    padded = PackedMatrix(jnp.pad(packed.blocks, [*widths, (0, 0)]), jnp.pad(packed.scales, widths))
    want = np.pad(dense, [(0, 1), (0, 32), (0, 0), (0, 3)])
    np.testing.assert_array_equal(np.stack([padded[group] for group in range(4)]), want)


def test_passes_through_jit(gate_up):
    packed, dense = gate_up
    np.testing.assert_array_equal(jax.jit(lambda w, i: w[i])(packed, 2), dense[2])
