"""linear against einsum: shapes, dtypes, gradients, and weights of which a device uses one block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from moe_cases import compiled, normal, relative

from moejax.kernels.block import Block, array_of
from moejax.kernels.linear import linear

CASES = {  # shapes of x and w, linear's options, einsum's formula
    "vector": ((3, 8), (8,), {}, "td,d->t"),
    "rows": ((2, 3, 8), (8, 5), {}, "bsd,dn->bsn"),
    "one row": ((1, 8), (8, 5), {}, "td,dn->tn"),
    "no rows": ((0, 8), (8, 5), {}, "td,dn->tn"),
    "several outputs": ((2, 3, 8), (8, 2, 5), {}, "bsd,dcn->bscn"),
    "several inputs": ((2, 3, 4, 2), (4, 2, 5), {"axes": 2}, "bsnh,nhd->bsd"),
    "transposed": ((2, 3, 8), (5, 8), {"transposed": True}, "bsd,vd->bsv"),
}


def with_gradients(f, x, w, dy):
    y, pullback = jax.vjp(f, x, w)
    return y, *pullback(dy)


@pytest.mark.parametrize("case", CASES)
def test_equals_einsum(case):
    x_shape, w_shape, options, formula = CASES[case]
    rng = np.random.default_rng(0)
    x, w = normal(rng, *x_shape), normal(rng, *w_shape)
    plain = lambda x, w: jnp.einsum(formula, x, w, precision="highest")  # noqa: E731
    dy = normal(rng, *plain(x, w).shape)
    got = compiled(lambda x, w, dy: with_gradients(lambda x, w: linear(x, w, **options), x, w, dy))(x, w, dy)
    for name, a, b in zip(("y", "dx", "dw"), got, with_gradients(plain, x, w, dy), strict=True):
        assert a.shape == b.shape, name
        assert not b.size or relative(a, b) < 1e-6, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_are_accumulated_in_float32(dtype):
    rng = np.random.default_rng(0)
    x, w = normal(rng, 3, 512).astype(dtype), normal(rng, 512, 7).astype(dtype)
    y = compiled(lambda x, w: linear(x, w, out_dtype=jnp.float32))(x, w)
    assert y.dtype == jnp.float32
    assert relative(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64)) < 1e-6
    assert compiled(linear)(x, w).dtype == dtype


BLOCKS = {  # shape of w, the axis of its blocks, their number, linear's options
    "inputs": ((12, 5), 0, 4, {}),
    "heads in": ((4, 3, 5), 0, 4, {"axes": 2}),
    "outputs": ((3, 8), 1, 4, {}),
    "heads out": ((3, 4, 5), 1, 4, {}),
    "gate and up": ((3, 2, 8), 2, 4, {}),
    "vocabulary": ((8, 3), 0, 4, {"transposed": True}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_each_device_uses_its_block(case, mesh):
    """Values and gradients of `linear` with a block are those with the block cut out."""
    shape, axis, count, options = BLOCKS[case]
    rng = np.random.default_rng(1)
    w = normal(rng, *shape)
    x = normal(rng, 6, *((1, 3) if options.get("axes") == 2 else (3,)))

    def on_devices(cut):
        def local(x, w):
            return linear(x, cut(Block(w, lax.axis_index("ep"), axis, count)), **options)[None]

        run = jax.shard_map(local, mesh=mesh("ep=4,tp=2"), in_specs=(P(), P()), out_specs=P("ep"))
        dy = normal(np.random.default_rng(2), *jax.eval_shape(run, x, w).shape)
        return compiled(lambda x, w, dy: with_gradients(run, x, w, dy))(x, w, dy)

    for a, b in zip(on_devices(lambda block: block), on_devices(array_of), strict=True):
        assert relative(a, b) < 1e-6
