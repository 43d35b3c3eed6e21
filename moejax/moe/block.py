"""`moe`: the mixture-of-experts block as a pure function on the caller's mesh. The one shard_map lives here."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from moejax.config import Activation
from moejax.errors import MoejaxError
from moejax.moe.auto import Choice, choose
from moejax.moe.params import PARAM_NAMES, ExpertParams, expert_specs, fill_up
from moejax.moe.placement import Placement
from moejax.moe.router import NOWHERE, Routing
from moejax.moe.strategies.all_reduce import all_reduce
from moejax.moe.strategies.all_to_all import all_to_all
from moejax.moe.strategies.local import Accounting, Local
from moejax.sharding import AnyMesh, axis_size, live_axes, live_spec, pad_axis, place, restore, round_up

StrategyFunction: TypeAlias = Callable[[jax.Array, Routing, ExpertParams, Local], tuple[jax.Array, Accounting]]
RUN: dict[str, StrategyFunction] = {"all_to_all": all_to_all, "all_reduce": all_reduce}


def moe(
    x: Float[Array, "*T D"],
    params: ExpertParams,
    routing: Routing,
    *,
    ep_axis: str = "ep",
    tp_axis: str = "tp",
    batch_axes: Sequence[str] | None = None,
    mesh: AnyMesh | None = None,
    strategy: Literal["auto", "all_to_all", "all_reduce"] = "auto",
    activation: Activation = "silu",
    scales_input: bool = False,
    capacity_factor: float | None = None,
    chunks: int = 1,
    num_experts: int | None = None,
) -> tuple[Float[Array, "*T D"], Accounting]:
    """Sends each token to its chosen experts and sums their outputs with the routing weights.

    The result is that of `dense_moe` on one device, whatever the mesh, the strategy and the routing; differentiable in
    `x`, `params` and `routing.weights`. Works inside jit, grad, checkpoint and other people's modules; not inside
    another shard_map.

    Args:
      x: tokens `[T, D]`, or `[B, S, D]`; the leading axis is the one that is cut.
      params: stacked experts. Where ep does not divide them, or tp their hidden width, they are padded here, at the
        cost of a copy.
      routing: choices and weights for each token, `[T, K]` or with x's leading axes. Expert -1 means nowhere.
      ep_axis: mesh axis that experts are cut over.
      tp_axis: mesh axis that each expert's hidden width is cut over.
      batch_axes: mesh axes that cut x's leading axis, such as `("dp", "ep")`. None: only `ep_axis`, and only under
        `all_to_all`.
      mesh: the mesh; None takes the one of `jax.set_mesh`, and without one the block runs on one device.
      strategy: "all_to_all" (tokens cut over ep), "all_reduce" (tokens replicated over ep), or "auto": all_to_all where
        the leading axis can be cut.
      activation: what experts make of gate and up.
      scales_input: a routing weight multiplies its expert's input instead of its output (Llama 4).
      capacity_factor: None is exact. A number is GShard's: each sender has `ceil(capacity_factor T K / E)` rows for an
        expert and drops later tokens' pairs, which `Accounting.dropped` counts. Only for all_to_all.
      chunks: all_to_all in this many slices of the local experts, so that a transfer can hide behind another slice's
        computation.
      num_experts: E, where `params` already holds empty slots behind the experts.

    Returns:
      The block's output in x's dtype and sharding, and its Accounting.

    Raises:
      MoejaxError: an axis that the mesh lacks, or a combination that a strategy cannot honour; the message says which.
    """
    mesh = mesh if mesh is not None else current_mesh()
    _check_axes(mesh, (ep_axis, tp_axis, *(batch_axes or ())))
    others = tuple(axis for axis in (batch_axes or ()) if axis != ep_axis)
    ep, tp, groups = axis_size(mesh, ep_axis), axis_size(mesh, tp_axis), axis_size(mesh, others)
    choice = _choice(strategy, capacity_factor, batch_axes, ep_axis, x.shape[0] // groups, ep)
    placement = Placement(num_experts or params.gate_up.shape[0], ep)  # before empty slots are added
    params = fill_up(params, ep, tp)
    local = Local(
        ep=ep_axis if ep > 1 else None,
        tp=tp_axis if tp > 1 else None,
        others=live_axes(mesh, others),
        tp_size=tp,
        placement=placement,
        activation=activation,
        capacity_factor=capacity_factor,
        chunks=chunks,
        scales_input=scales_input,
    )
    _check_options(choice, params, local)
    if routing.experts.ndim < x.ndim:
        routing = jax.tree.map(lambda a: a.reshape(*x.shape[:-1], -1), routing)
    run = functools.partial(_run_flat, RUN[choice.strategy], local=local)
    if mesh is None:
        return run(x, routing, params)
    return _on_mesh(run, x, routing, params, choice, local, mesh)


def current_mesh() -> AnyMesh | None:
    """The mesh of `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _run_flat(
    strategy: StrategyFunction, x: jax.Array, routing: Routing, params: ExpertParams, *, local: Local
) -> tuple[jax.Array, Accounting]:
    tokens = x.reshape(-1, x.shape[-1])
    flat = jax.tree.map(lambda a: a.reshape(tokens.shape[0], -1), routing)
    y, accounting = strategy(tokens, flat, params, local)
    return y.reshape(x.shape), accounting


def _on_mesh(
    run: Callable[..., tuple[jax.Array, Accounting]],
    x: jax.Array,
    routing: Routing,
    params: ExpertParams,
    choice: Choice,
    local: Local,
    mesh: AnyMesh,
) -> tuple[jax.Array, Accounting]:
    cut = local.others + (local.ep_axes if choice.strategy == "all_to_all" else ())
    rows = round_up(x.shape[0], axis_size(mesh, cut))
    spec = live_spec(mesh, cut)
    weights = expert_specs(mesh, params, local.ep, local.tp)
    inputs = (
        (pad_axis(x, 0, rows), spec),
        (pad_axis(routing.weights, 0, rows), spec),
        (pad_axis(routing.experts, 0, rows, NOWHERE), spec),
        *((getattr(params, name), getattr(weights, name)) for name in PARAM_NAMES),
    )
    arrays = [jax.tree.map(lambda a, s: place(a, mesh, s), a, s) for a, s in inputs]
    mapped = jax.shard_map(
        lambda x, w, e, *p: run(x, Routing(w, e), ExpertParams(*p)),
        mesh=mesh,
        in_specs=tuple(s for _, s in inputs),
        out_specs=(spec, PartitionSpec()),
        check_vma=True,
    )
    y, accounting = mapped(*arrays)
    if rows != x.shape[0]:  # cut unevenly, which no sharding over these axes can hold
        y = place(y, mesh, PartitionSpec())[: x.shape[0]]
    return restore(y, x), accounting


def _choice(
    strategy: str, capacity_factor: float | None, batch_axes: Sequence[str] | None, ep_axis: str, rows: int, ep: int
) -> Choice:
    if strategy == "auto" and capacity_factor is not None:
        return Choice("all_to_all", "capacity_factor was asked for")
    if batch_axes is None or strategy != "auto":
        choice = choose(strategy, rows, ep)
    elif ep_axis in batch_axes and ep > 1:
        choice = Choice("all_to_all", f"tokens are cut over {ep_axis}")
    else:
        choice = Choice("all_reduce", f"every device along {ep_axis} holds all tokens")
    if choice.strategy == "all_reduce" and ep_axis in (batch_axes or ()) and ep > 1:
        raise MoejaxError(
            f"strategy all_reduce needs tokens replicated over {ep_axis!r}, but batch_axes={tuple(batch_axes or ())} "
            "cuts them over it; leave it out of batch_axes, or use all_to_all"
        )
    return choice


def _check_axes(mesh: AnyMesh | None, axes: Sequence[str]) -> None:
    if mesh is None:
        return
    for axis in axes:
        if axis not in mesh.shape:
            raise MoejaxError(
                f"the mesh has no axis {axis!r}, only {tuple(mesh.shape)}; "
                "name yours with ep_axis=, tp_axis=, batch_axes="
            )
    manual = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual]
    if manual:
        raise MoejaxError(f"moe() makes its own shard_map and cannot run inside one (over {manual}); call it outside")


def _check_options(choice: Choice, params: ExpertParams, local: Local) -> None:
    if choice.strategy == "all_reduce" and local.capacity_factor is not None:
        raise MoejaxError("capacity_factor is for strategy all_to_all; all_reduce sends no rows and can drop none")
    if local.capacity_factor is not None and local.capacity_factor <= 0:
        raise MoejaxError(f"capacity_factor={local.capacity_factor} must be above 0 (1.25 is usual)")
    if local.chunks < 1 or local.placement.slots_per_device % local.chunks:
        raise MoejaxError(
            f"chunks={local.chunks} does not divide the {local.placement.slots_per_device} expert slots of a device"
        )
    if params.gate_up.shape[0] != local.placement.slots:
        raise MoejaxError(
            f"{params.gate_up.shape[0]} stacked experts for num_experts={local.placement.num_experts} "
            f"on ep={local.ep_size}; there must be {local.placement.slots} slots"
        )
