"""Cases of grouped products that break kernels, and the oracle they are held to: a loop over rows in float64."""

import re
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike
from moe_cases import compiled, normal, relative

CASES = [
    pytest.param(12, [3, 0, 5, 4], id="an empty group"),
    pytest.param(12, [0, 0, 12, 0], id="one group with all rows"),
    pytest.param(13, [3, 0, 2, 4], id="rows past the end"),
    pytest.param(300, [130, 0, 1, 157], id="sizes that no tile divides"),
    pytest.param(1, [0, 1], id="one row"),
    pytest.param(12, [0, 0], id="only empty groups"),
    pytest.param(0, [0, 0], id="no rows"),
]


def by_rows(x: ArrayLike, w: ArrayLike, sizes: list[int], dy: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx and dw, one row at a time in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(w)), sizes)):
        y[row], dx[row] = x[row] @ w[group], dy[row] @ w[group].T
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


def check(
    products: Callable[..., jax.Array],
    weight_gradient: Callable[..., jax.Array] | None,
    rows: int,
    sizes: list[int],
    shape: tuple[int, int] = (40, 72),
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Product, transposed product and weight gradient of one case; the rows past the last group are NaN."""
    (inner, outer), groups = shape, len(sizes)
    rng = np.random.default_rng(rows)
    arrays = normal(rng, rows, inner), normal(rng, groups, inner, outer), normal(rng, rows, outer)
    x, w, dy = (a.astype(dtype) for a in arrays)
    want = by_rows(x, w, sizes, dy)
    past = np.arange(rows)[:, None] >= sum(sizes)
    x, dy, group_sizes = jnp.where(past, jnp.nan, x), jnp.where(past, jnp.nan, dy), jnp.array(sizes, jnp.int32)

    @compiled
    def all_three(x, w, dy, group_sizes):
        y = products(x, w, group_sizes, transposed=False, out_dtype=dtype)
        dx = products(dy, w, group_sizes, transposed=True, out_dtype=dtype)
        if weight_gradient is None:
            return y, dx
        return y, dx, weight_gradient(x, dy, group_sizes, groups=groups, out_dtype=dtype)

    for name, got, expected in zip(("y", "dx", "dw"), all_three(x, w, dy, group_sizes), want, strict=False):
        assert got.dtype == dtype, name
        if expected.size:
            assert relative(got.astype(jnp.float32), expected) < (1e-5 if dtype == jnp.float32 else 2**-8), name
            assert not np.asarray(got)[expected == 0].any(), f"{name} is not exactly zero where nothing contributes"
        else:
            assert got.shape == expected.shape, name


def check_marks(
    mesh: Mesh,
    products: Callable[..., jax.Array],
    weight_gradient: Callable[..., jax.Array],
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Traces all three in shard_map, rows and groups cut over ep, outputs over tp: the results vary over both.

    Traced only: Pallas' interpreter does not run where shard_map checks what varies.
    """
    x, w, dy = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((16, 32), (4, 32, 64), (16, 64)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def all_three(x, w, dy, sizes):
        y = products(x, w, sizes, transposed=False, out_dtype=dtype)
        dx = products(dy, w, sizes, transposed=True, out_dtype=dtype)
        dw = weight_gradient(x, dy, sizes, groups=w.shape[0], out_dtype=dtype)
        assert {jax.typeof(out).manual_axis_type.varying for out in (y, dx, dw)} == {frozenset({"ep", "tp"})}
        return y, jax.lax.psum(dx, "tp"), dw

    of_w = P("ep", None, "tp")
    specs = (P("ep"), of_w, P("ep", "tp"), P("ep"))
    mapped = jax.shard_map(all_three, mesh=mesh, in_specs=specs, out_specs=(P("ep", "tp"), P("ep"), of_w))
    shapes = [out.shape for out in jax.eval_shape(mapped, x, w, dy, sizes)]
    assert shapes == [dy.shape, x.shape, w.shape]


def product_precisions(products: Callable[..., jax.Array], weight_gradient: Callable[..., jax.Array]) -> set[str]:
    """The precisions that the matrix products of all three in float32 name."""
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (4, 32, 64), (16, 64)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def all_three(x, w, dy, sizes):
        y = products(x, w, sizes, transposed=False, out_dtype=jnp.float32)
        dx = products(dy, w, sizes, transposed=True, out_dtype=jnp.float32)
        return y, dx, weight_gradient(x, dy, sizes, groups=4, out_dtype=jnp.float32)

    text = str(jax.make_jaxpr(all_three)(x, w, dy, sizes))
    found = re.findall(r"dot_general\[(.*?)\] \w+ \w+", text, re.DOTALL)
    assert len(found) >= 3
    return {name for part in found for name in (re.findall(r"Precision\.(\w+)", part) or ["None"])}


def compile_all(
    mesh: Mesh, kernels: ModuleType, rows: int, shape: tuple[int, int], dtype: DTypeLike
) -> list[jax.stages.Compiled]:
    """Product, transposed product and weight gradient, compiled for a mesh of ep=4; `rows` and 4 groups a device."""
    (inner, outer), struct = shape, jax.ShapeDtypeStruct
    x, w, dy = (struct(size, dtype) for size in ((4 * rows, inner), (16, inner, outer), (4 * rows, outer)))

    def y(x, w, sizes):
        return kernels.products(x, w, sizes, transposed=False, out_dtype=dtype)

    def dx(dy, w, sizes):
        return kernels.products(dy, w, sizes, transposed=True, out_dtype=dtype)

    def dw(x, dy, sizes):
        return kernels.weight_gradient(x, dy, sizes, groups=4, out_dtype=dtype)

    programs = []
    for function, *operands in ((y, x, w), (dx, dy, w), (dw, x, dy)):
        mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        programs.append(mapped.lower(*operands, struct((16,), jnp.int32)).compile())
    return programs
