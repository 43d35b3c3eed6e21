"""What a start-up report says: four lines on how a model lies on its mesh."""

from collections import defaultdict

import numpy as np

from moejax.language_model import LanguageModel
from moejax.mesh import describe
from moejax.model import lay
from moejax.moe.placement import Placement
from moejax.moe.strategies.all_to_all import make_cells
from moejax.moe.strategies.local import Local
from moejax.moe.strategies.shares import divides
from moejax.nn.head_share import HeadShare
from moejax.nn.heads import head_layout

CLASSES = ("experts", "attention", "embedding", "other")


def report_lines(model: LanguageModel, batch: int) -> list[str]:
    """Experts and slots a device, the strategy and why, how attention is split, bytes by class."""
    return [_experts(model), _strategy(model, batch), _attention(model, batch), _bytes(model)]


def bytes_by_class(model: LanguageModel) -> dict[str, tuple[int, int]]:
    """For experts, attention, embedding and the rest: bytes of the model, and of the fullest device's part."""
    totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for role, array in model.parameters().items():
        whole, part = totals[_class_of(role)]
        shard = int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
        totals[_class_of(role)] = whole + array.nbytes, part + shard
    return {name: totals[name] for name in CLASSES if name in totals}


def human_bytes(count: float) -> str:
    """Such as "16.3 MB" (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _class_of(role: str) -> str:
    parts = role.split(".")
    if "moe" in parts:
        return "other" if parts[-1] == "router" else "experts"
    if "attention" in parts:
        return "attention"
    return "embedding" if parts[0] in ("embed", "lm_head") else "other"


def _experts(model: LanguageModel) -> str:
    config, ep = model.config, model.mesh.shape["ep"]
    if not any(config.sparse):
        return f"mesh      {describe(model.mesh)}; no layer has experts"
    placement = Placement(config.moe.num_experts, ep)
    empty = placement.slots - placement.num_experts
    width = -(-config.moe.intermediate_size // model.mesh.shape["tp"])
    return (
        f"mesh      {describe(model.mesh)}: "
        f"{placement.num_experts} experts in {placement.slots_per_device} slots a device"
        + (f" ({empty} of {placement.slots} slots empty)" if empty else "")
        + f", {width} of {config.moe.intermediate_size} hidden columns each"
    )


def _strategy(model: LanguageModel, batch: int) -> str:
    lie = lay(batch, model.mesh, model.options)
    padding = f", {lie.rows - batch} empty rows fill it up" if lie.rows > batch else ""
    sequences = f"{batch} sequence{'s'[: batch > 1]}"
    return f"strategy  {lie.choice.strategy} for prefill and decode of {sequences}: {lie.choice.reason}{padding}"


def _attention(model: LanguageModel, batch: int) -> str:
    attention, mesh = model.config.attention, model.mesh
    stream = lay(batch, mesh, model.options).stream
    share = HeadShare.of(head_layout(attention.num_heads, attention.num_kv_heads, mesh.shape["tp"]), stream)
    data = mesh.shape["ep"] if stream.cut else 1
    tensor = mesh.shape["tp"] * share.helpers
    alike = mesh.shape["ep"] // (data * share.helpers)
    return (
        f"attention data parallel {data} x tensor parallel {tensor}"
        + (f" x {alike} alike" if alike > 1 else "")
        + f": {share.heads} of {attention.num_heads} heads over {share.kv_heads} of {attention.num_kv_heads} "
        "key/value heads a device"
    )


def _bytes(model: LanguageModel) -> str:
    classes = bytes_by_class(model)
    parts = ", ".join(f"{name} {human_bytes(part)}" for name, (_, part) in classes.items())
    whole, part = (sum(pair[i] for pair in classes.values()) for i in (0, 1))
    return f"memory    {human_bytes(part)} of {human_bytes(whole)} parameters a device: {parts}"


def explain_lines(model: LanguageModel, batch: int, prompt_tokens: int) -> list[str]:
    """What `--explain` adds: a layer's exchange, for a prefill of `prompt_tokens` a row and for a decode step."""
    if not any(model.config.sparse):
        return ["explain   no layer has experts, so there is nothing to exchange"]
    return [_explain(model, batch, name, tokens) for name, tokens in (("prefill", prompt_tokens), ("decode", 1))]


def _explain(model: LanguageModel, batch: int, phase: str, tokens: int) -> str:
    config, lie = model.config, lay(batch, model.mesh, model.options)
    ep, width = model.mesh.shape["ep"], config.hidden_size
    item = next(iter(model.parameters().values())).dtype.itemsize
    here = lie.rows * tokens // (ep if lie.stream.cut else 1)
    start = f"explain   {phase} of {batch} x {tokens} tokens, a layer: "
    if lie.choice.strategy == "all_reduce":
        return (
            f"{start}one all-reduce of {human_bytes(here * width * item)}, each device computing its own experts' pairs"
        )
    local = Local(
        ep="ep",
        tp="tp",
        others=(),
        tp_size=model.mesh.shape["tp"],
        placement=Placement(config.moe.num_experts, ep),
        activation=config.moe.activation,
        capacity_factor=lie.parallel.capacity_factor,
        chunks=lie.parallel.chunks,
    )
    rows = make_cells(here, config.moe.num_experts_per_tok, local).rows
    share = width // local.tp_size if divides(width, local) else width
    payload = 2 * lie.parallel.chunks * ep * rows * share * item
    exact = "repeated until nothing is left" if local.capacity_factor is None else "what does not fit is dropped"
    return f"{start}cells of {rows} row{'s'[: rows > 1]}, {human_bytes(payload)} over ep there and back, {exact}"
