"""What a start-up report says: four lines on how a model lies on its mesh."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moejax.config import AttentionConfig, LatentAttentionConfig, Mixer, MoEConfig
from moejax.language_model import LanguageModel
from moejax.mesh import describe
from moejax.model import Lie, lay
from moejax.moe.placement import Placement
from moejax.moe.strategies.all_to_all import make_cells
from moejax.moe.strategies.local import Local
from moejax.moe.strategies.shares import divides
from moejax.nn.head_share import HeadShare

CLASSES = ("experts", "attention", "embedding", "other")


def report_lines(model: LanguageModel, batch: int) -> list[str]:
    """Experts and slots a device, the strategy and why, how attention is split, bytes by class."""
    classes = bytes_by_class(model.parameters().items())
    return [_experts(model), _strategy(model, batch), _attention(model, batch), _memory(classes, "parameters")]


def training_lines(model: LanguageModel, batch: int, parts: int, state: Iterable[tuple[str, Any]]) -> list[str]:
    """The same before a training run.

    Args:
      model: its decoder may be without arrays.
      batch: sequences of a step.
      parts: that a step's batch is computed in.
      state: (role, array or its shape, dtype and sharding) of master weights and of what the optimizer keeps of them.
    """
    rows = batch // parts
    lie = lay(rows, model.mesh, model.options)
    times = f"{parts} times " if parts > 1 else ""
    strategy = f"strategy  {lie.choice.strategy} for steps of {times}{_sequences(rows)}: {lie.choice.reason}"
    memory = _memory(bytes_by_class(state), "weights and optimizer in float32")
    return [_experts(model), strategy + _padding(lie, rows), _attention(model, rows), memory]


def bytes_by_class(arrays: Iterable[tuple[str, Any]]) -> dict[str, tuple[int, int]]:
    """For experts, attention, embedding and the rest: bytes of all, and of the fullest device's part.

    Args:
      arrays: (role, array or its shape, dtype and sharding); a role may come again.
    """
    totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for role, array in arrays:
        whole, part = totals[_class_of(role)]
        size, shard = (math.prod(shape) for shape in (array.shape, array.sharding.shard_shape(array.shape)))
        totals[_class_of(role)] = whole + size * array.dtype.itemsize, part + shard * array.dtype.itemsize
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
    moe = _moe(model)
    if moe is None:
        return f"mesh      {describe(model.mesh)}; no layer has experts"
    placement = Placement(moe.num_experts, model.mesh.shape["ep"])
    empty = placement.slots - placement.num_experts
    width = -(-moe.intermediate_size // model.mesh.shape["tp"])
    return (
        f"mesh      {describe(model.mesh)}: "
        f"{placement.num_experts} experts in {placement.slots_per_device} slots a device"
        + (f" ({empty} of {placement.slots} slots empty)" if empty else "")
        + f", {width} of {moe.intermediate_size} hidden columns each"
    )


def _strategy(model: LanguageModel, batch: int) -> str:
    lie = lay(batch, model.mesh, model.options)
    choice = lie.choice
    return f"strategy  {choice.strategy} for prefill and decode of {_sequences(batch)}: {choice.reason}" + _padding(
        lie, batch
    )


def _sequences(count: int) -> str:
    return f"{count} sequence{'s'[: count > 1]}"


def _padding(lie: Lie, rows: int) -> str:
    return f", {lie.rows - rows} empty rows fill it up" if lie.rows > rows else ""


def _moe(model: LanguageModel) -> MoEConfig | None:
    """The experts of the first layer that has some."""
    return next((layer.moe for layer in model.config.layers if layer.moe is not None), None)


def _attention(model: LanguageModel, batch: int) -> str:
    """How heads are split: layers that are split alike together, and a split that all share once."""
    mesh = model.mesh
    stream = lay(batch, mesh, model.options).stream
    data = mesh.shape["ep"] if stream.cut else 1
    kinds = Counter()
    for layer, block in zip(model.config.layers, model.decoder.layers, strict=True):
        share = block.attention.share(stream)
        alike = mesh.shape["ep"] // (data * share.helpers)
        split = f"tensor parallel {mesh.shape['tp'] * share.helpers}" + (f" x {alike} alike" if alike > 1 else "")
        kinds[split, _heads(layer.mixer, share)] += 1
    parts, before = [], ""
    for (split, heads), count in kinds.items():
        layers = f" in {count} layer{'s'[: count > 1]}" if len(kinds) > 1 else ""
        parts.append((f"{split}: " if split != before else "") + heads + layers)
        before = split
    return f"attention data parallel {data} x {'; '.join(parts)}"


def _heads(mixer: Mixer, share: HeadShare) -> str:
    if isinstance(mixer, AttentionConfig):
        few = f"{share.kv_heads} of {mixer.num_kv_heads} key/value heads"
        return f"{share.heads} of {mixer.num_heads} heads over {few} a device"
    if isinstance(mixer, LatentAttentionConfig):
        return f"{share.heads} of {mixer.num_heads} heads a device over one latent of {mixer.kv_rank} values"
    return f"{share.heads} of {mixer.num_value_heads} heads with a recurrent state a device"


def _memory(classes: Mapping[str, tuple[int, int]], of_what: str) -> str:
    parts = ", ".join(f"{name} {human_bytes(part)}" for name, (_, part) in classes.items())
    whole, part = (sum(pair[i] for pair in classes.values()) for i in (0, 1))
    return f"memory    {human_bytes(part)} of {human_bytes(whole)} {of_what} a device: {parts}"


def explain_lines(model: LanguageModel, batch: int, prompt_tokens: int) -> list[str]:
    """What `--explain` adds: a layer's exchange, for a prefill of `prompt_tokens` a row and for a decode step."""
    if not model.config.sparse:
        return ["explain   no layer has experts, so there is nothing to exchange"]
    return [_explain(model, batch, name, tokens) for name, tokens in (("prefill", prompt_tokens), ("decode", 1))]


def _explain(model: LanguageModel, batch: int, phase: str, tokens: int) -> str:
    lie, moe = lay(batch, model.mesh, model.options), _moe(model)
    assert moe is not None
    ep, width = model.mesh.shape["ep"], moe.hidden_size
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
        placement=Placement(moe.num_experts, ep),
        activation=moe.activation,
        capacity_factor=lie.parallel.capacity_factor,
        chunks=lie.parallel.chunks,
    )
    rows = make_cells(here, moe.num_experts_per_tok, local).rows
    share = width // local.tp_size if divides(width, local) else width
    payload = 2 * lie.parallel.chunks * ep * rows * share * item
    exact = "repeated until nothing is left" if local.capacity_factor is None else "what does not fit is dropped"
    return f"{start}cells of {rows} row{'s'[: rows > 1]}, {human_bytes(payload)} over ep there and back, {exact}"
