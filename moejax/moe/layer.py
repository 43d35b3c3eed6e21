"""The mixture-of-experts layer as a flax.nnx module, for moejax's own decoder and for anybody's model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from moejax.config import MoEConfig
from moejax.moe.block import current_mesh, moe
from moejax.moe.jitter import Jitter
from moejax.moe.packed import PackedExperts
from moejax.moe.params import PARAM_NAMES, ExpertParams
from moejax.moe.placement import Placement
from moejax.moe.router import Router, Routing, router_for
from moejax.moe.strategies.local import Accounting
from moejax.precision import precision_of
from moejax.quantization.packed import packed_width
from moejax.sharding import AnyMesh, axis_size, round_up, sharded_param


@struct.dataclass
class MoEDetails:
    """What a layer decided: for losses, for looking, for accounting.

    Attributes:
      router_logits: f32.
      routing: chosen experts and weights.
      accounting: tokens per expert, drops, waves, bytes.
    """

    router_logits: Float[Array, "*T E"]
    routing: Routing
    accounting: Accounting


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a layer runs on a mesh; the fields are those of `moejax.moe`."""

    ep_axis: str = "ep"
    tp_axis: str = "tp"
    batch_axes: tuple[str, ...] | None = None
    strategy: Literal["auto", "all_to_all", "all_reduce"] = "auto"
    capacity_factor: float | None = None
    chunks: int = 1


class MoE(nnx.Module):
    """Router, stacked experts and, where the config has one, a shared expert.

    Parameters are `router [D, E]`, `gate_up [slots, D, 2, F]`, `down [slots, F, D]` (or both as MXFP4, see
    `PackedExperts`) and, where the config has them:
      - of a shared expert `shared_gate_up [D, 2, Fs]`, `shared_down [Fs, D]`, `shared_gate [D]`,
      - of a shared expert with biases `shared_gate_up_bias [2, Fs]`, `shared_down_bias [D]`,
      - of experts with biases `gate_up_bias [slots, 2, F]`, `down_bias [slots, D]`,
      - of the router `router_bias [E]`, `expert_scale [E]` and `correction [E]`, which is f32 always.
    Experts are annotated with `(ep, tp)`: slots over `ep`, hidden width over `tp`, both zero-padded to what the mesh
    divides. The same `rngs` give the same layer on every mesh.

    Example:
      >>> import jax, jax.numpy as jnp, moejax
      >>> from flax import nnx
      >>> config = moejax.MoEConfig(hidden_size=64, intermediate_size=128, num_experts=8, num_experts_per_tok=2)
      >>> with jax.set_mesh(moejax.make_mesh("ep=1,tp=1")):
      ...     layer = moejax.MoE(config, rngs=nnx.Rngs(0))
      ...     layer(jnp.ones((4, 16, 64))).shape
      (4, 16, 64)
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        rngs: nnx.Rngs,
        router: Router | None = None,
        dtype: DTypeLike = jnp.float32,
        mesh: AnyMesh | None = None,
        ep_axis: str = "ep",
        tp_axis: str = "tp",
        batch_axes: Sequence[str] | None = None,
        strategy: Literal["auto", "all_to_all", "all_reduce"] = "auto",
        capacity_factor: float | None = None,
        chunks: int = 1,
    ):
        """Random weights, normal with the standard deviation 1 / sqrt(inputs); biases are 0 and scales 1.

        Args:
          config: sizes, activation, routing and shared expert.
          rngs: the stream `params` is drawn from.
          router: a callable `logits [..., E] f32 -> Routing`; None is the config's own. It gets `correction` and
            `expert_scale` as keywords where `config.router` has them.
          dtype: of the parameters and of the computation.
          mesh: None takes the mesh of `jax.set_mesh`, here and at every call; without one all is on one device.
          ep_axis, tp_axis, batch_axes, strategy, capacity_factor, chunks: as `moejax.moe` takes them.
        """
        self.config, self.mesh = config, mesh
        self.route = router or router_for(config)
        self.parallel = Parallel(
            ep_axis, tp_axis, None if batch_axes is None else tuple(batch_axes), strategy, capacity_factor, chunks
        )
        where = mesh if mesh is not None else current_mesh()
        ep, tp = axis_size(where, ep_axis), axis_size(where, tp_axis)
        slots = Placement(config.num_experts, ep).slots
        wide = (packed_width if config.packed else round_up)(config.intermediate_size, tp)
        d, f, e = config.hidden_size, config.intermediate_size, config.num_experts

        def param(full: tuple[int, ...], padded: tuple[int, ...], inputs: int, *cut: str | None) -> nnx.Param:
            value = jax.random.normal(rngs.params(), full, dtype) * jnp.asarray(inputs**-0.5, dtype)
            return sharded_param(_zero_fill(value, padded), where, *cut)

        def constant(value: float, shape: tuple[int, ...], dtype: DTypeLike, *cut: str | None) -> nnx.Param:
            return sharded_param(jnp.full(shape, value, dtype), where, *cut)

        self.router = param((d, e), (d, e), d, None, None)
        if config.packed:
            self.gate_up = PackedExperts((slots, 2, wide), d, (ep_axis, None, tp_axis, None), where)
            self.down = PackedExperts((slots, d), wide, (ep_axis, None, tp_axis), where)
        else:
            self.gate_up = param((e, d, 2, f), (slots, d, 2, wide), d, ep_axis, None, None, tp_axis)
            self.down = param((e, f, d), (slots, wide, d), f, ep_axis, tp_axis, None)
        shared, shared_wide = config.shared_intermediate_size, round_up(config.shared_intermediate_size, tp)
        self.shared_gate_up = param((d, 2, shared), (d, 2, shared_wide), d, None, None, tp_axis) if shared else None
        self.shared_down = param((shared, d), (shared_wide, d), shared, tp_axis, None) if shared else None
        self.shared_gate = param((d,), (d,), d, None) if config.shared_gate else None
        self.gate_up_bias = constant(0, (slots, 2, wide), dtype, ep_axis, None, tp_axis) if config.bias else None
        self.down_bias = constant(0, (slots, d), dtype, ep_axis, None) if config.bias else None
        self.shared_gate_up_bias = constant(0, (2, shared_wide), dtype, None, tp_axis) if config.shared_bias else None
        self.shared_down_bias = constant(0, (d,), dtype, None) if config.shared_bias else None
        self.router_bias = constant(0, (e,), dtype, None) if config.router.bias else None
        self.correction = constant(0, (e,), jnp.float32, None) if config.router.correction else None
        self.expert_scale = constant(1, (e,), dtype, None) if config.router.expert_scale else None

    def __call__(self, x: Float[Array, "*T D"], mask: Bool[Array, "*T"] | None = None) -> Float[Array, "*T D"]:
        """The block's output; tokens where `mask` is false (padding) go to no expert and are counted nowhere."""
        return self.with_details(x, mask)[0]

    def with_details(
        self,
        x: Float[Array, "*T D"],
        mask: Bool[Array, "*T"] | None = None,
        parallel: Parallel | None = None,
        router_input: Float[Array, "*T D"] | None = None,
        jitter: Jitter | None = None,
    ) -> tuple[Float[Array, "*T D"], MoEDetails]:
        """The output, and what the router decided.

        Args:
          x: what experts read.
          mask: false for padding.
          parallel: replaces the layer's own for this call.
          router_input: what the router reads, of x's dtype; None is x.
          jitter: noise on what the router reads.
        """
        with jax.named_scope("router"):
            seen = x if router_input is None else router_input
            logits = self.router_logits(seen if jitter is None else jitter(seen))
            routing = self.route(logits, **self.learned_routing())
            routing = routing if mask is None else routing.only(mask)
        p = parallel or self.parallel
        y, accounting = moe(
            x,
            self.expert_params(),
            routing,
            ep_axis=p.ep_axis,
            tp_axis=p.tp_axis,
            batch_axes=p.batch_axes,
            mesh=self.mesh,
            strategy=p.strategy,
            activation=self.config.activation,
            scales_input=self.config.scales_input,
            capacity_factor=p.capacity_factor,
            chunks=p.chunks,
            num_experts=self.config.num_experts,
        )
        return y, MoEDetails(logits, routing, accounting)

    def router_logits(self, x: Float[Array, "*T D"]) -> Float[Array, "*T E"]:
        """The logits, bias included, f32 whatever the dtype of x."""
        logits = jnp.einsum(
            "...d,de->...e", x, self.router[...], precision=precision_of(x.dtype), preferred_element_type=jnp.float32
        )
        return logits if self.router_bias is None else logits + self.router_bias[...].astype(jnp.float32)

    def learned_routing(self) -> dict[str, Float[Array, " E"]]:
        """The keywords that the layer's router takes."""
        learned = {"correction": self.correction, "expert_scale": self.expert_scale}
        return {name: p[...] for name, p in learned.items() if p is not None}

    def expert_params(self) -> ExpertParams:
        """The weights as the pure functions take them."""

        def value(p: nnx.Param | PackedExperts | None) -> Any:
            return p.matrix() if isinstance(p, PackedExperts) else None if p is None else p[...]

        return ExpertParams(**{name: value(getattr(self, name)) for name in PARAM_NAMES})


def _zero_fill(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(value, [(0, full - have) for full, have in zip(shape, value.shape, strict=True)])
