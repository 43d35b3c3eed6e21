"""What this machine can do at the most, measured: products of matrices, and reading memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.benchmarks.peers import Child
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.precision import precision_of

_SIZES = {"cpu": (1024, 2048)}
_LARGE_SIZES = (4096, 8192)
_READ_BYTES = {"cpu": 1 << 29}
_LARGE_READ_BYTES = 1 << 32
"""Far over any cache, and long enough that starting a program does not count."""
_WIDTH = 8192

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Limit:
    """The best of several ways to do one thing, a second, and the way that was best."""

    rate: float
    by: str

    def times(self, count: int) -> "Limit":
        """Of `count` devices together."""
        return Limit(self.rate * count, self.by)


def chips(mesh: Mesh) -> int:
    """Devices with a memory and arithmetic of their own: virtual devices of a CPU share one."""
    return 1 if mesh.devices.flat[0].platform == "cpu" else mesh.devices.size


def matrix_peak(dtype: str, peer: Child | None = None) -> Limit:
    """FLOPs a second of a large square product in `dtype` on one chip: by XLA, the package's own kernel, the peer."""
    sizes = _SIZES.get(jax.default_backend(), _LARGE_SIZES)
    found = [
        Limit(2 * n**3 / _seconds(way, *_square(n, dtype)), f"{name} {n}") for n in sizes for name, way in _PRODUCTS
    ]
    if peer is not None:
        found += [Limit(2 * n**3 / peer.ask("matmul", dtype=dtype, size=n)["seconds"], f"torch {n}") for n in sizes]
    return max(found, key=lambda limit: limit.rate)


def read_bandwidth(peer: Child | None = None) -> Limit:
    """Bytes a second that arrive from one chip's memory: XLA's sum of an array far over the caches, one row times a
    matrix of that size by XLA and by the package's own kernel, and the peer's sum."""
    size = _READ_BYTES.get(jax.default_backend(), _LARGE_READ_BYTES)
    matrix = jnp.ones((size // 4 // _WIDTH, _WIDTH), jnp.float32)
    row = jnp.ones((1, len(matrix)), jnp.float32)
    found = [Limit(matrix.nbytes / _seconds(way, row, matrix), f"{name} row") for name, way in _PRODUCTS]
    found.append(Limit(matrix.nbytes / _seconds(lambda matrix: matrix.sum(1), matrix), "XLA sum"))
    if peer is not None:
        found.append(Limit(size / peer.ask("read", size=size)["seconds"], "torch sum"))
    return max(found, key=lambda limit: limit.rate)


def _xla(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision=precision_of(x.dtype))


def _one_group(x: jax.Array, w: jax.Array) -> jax.Array:
    return grouped_matmul(x, w[None], jnp.array([x.shape[0]], jnp.int32))


_PRODUCTS: tuple[tuple[str, Callable[[jax.Array, jax.Array], jax.Array]], ...] = (
    ("XLA", _xla),
    ("grouped_matmul", _one_group),
)


def _square(size: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    make = partial(jax.random.normal, shape=(size, size), dtype=jnp.dtype(dtype))
    return make(jax.random.key(0)), make(jax.random.key(1))


def _seconds(function: Callable[..., jax.Array], *arrays: jax.Array) -> float:
    """The best of a few runs, since a limit is asked for; compilation and a first run left out."""
    program = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(program(*arrays))
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
