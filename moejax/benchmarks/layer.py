"""One mixture-of-experts block alone: meshes, strategies and numbers of tokens take turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moejax.benchmarks.interleave import Spread, interleave
from moejax.benchmarks.work import expert_values
from moejax.config import ModelConfig, MoEConfig
from moejax.errors import MoejaxError
from moejax.moe.layer import MoE


@dataclass(frozen=True, slots=True)
class Case:
    """One combination that is timed."""

    mesh: Mesh
    strategy: str
    tokens: int

    @property
    def name(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return f"{axes} {self.strategy} {self.tokens}"


def block_of(config: ModelConfig) -> MoEConfig:
    """The experts of the first layer that has some.

    Raises:
      MoejaxError: no layer has.
    """
    moe = next((layer.moe for layer in config.layers if layer.moe is not None), None)
    if moe is None:
        raise MoejaxError("no layer of this model has experts; name another one")
    return moe


def layer_flops(moe: MoEConfig, tokens: int) -> float:
    """FLOPs of a block: 2 for each value of the router, of the K chosen experts and of the shared one, and token."""
    shared = 3 * moe.hidden_size * moe.shared_intermediate_size
    return 2.0 * tokens * (moe.hidden_size * moe.num_experts + expert_values(moe) + shared)


def time_layers(
    moe: MoEConfig, cases: Sequence[Case], dtype: str, rounds: int, tick: Callable[[str, int], None]
) -> dict[str, Spread]:
    """Seconds of a forward pass for each case. Weights are random, the same for all; compilation is left out."""
    blocks: dict[tuple[Mesh, str], nnx.Module] = {}
    contenders = {}
    for case in cases:
        key = case.mesh, case.strategy
        if key not in blocks:
            blocks[key] = _block(moe, case, dtype)
        contenders[case.name] = _forward(blocks[key], case, moe.hidden_size, dtype)
    return {name: Spread.of(seconds) for name, seconds in interleave(contenders, rounds, tick).items()}


def _block(moe: MoEConfig, case: Case, dtype: str) -> nnx.Module:
    with jax.set_mesh(case.mesh):
        return MoE(moe, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), mesh=case.mesh, strategy=case.strategy)  # type: ignore[arg-type]


def _forward(block: nnx.Module, case: Case, width: int, dtype: str) -> Callable[[], float]:
    graph, state = nnx.split(block)
    x = jax.random.normal(jax.random.key(0), (case.tokens, width), jnp.dtype(dtype))

    def forward(state: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x)  # type: ignore[operator]

    with jax.set_mesh(case.mesh):
        program = jax.jit(forward).lower(state, x).compile()

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(state, x))
        return time.perf_counter() - began

    return run
