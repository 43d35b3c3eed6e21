"""The tensors of grouped-query attention."""

from collections.abc import Iterator

from moejax.checkpoint.entries import Entry, Heads, LayerNames, whole_tensor
from moejax.config import AttentionConfig, NormConfig
from moejax.nn.heads import head_layout


def attention_entries(
    config: AttentionConfig, norm: NormConfig, width: int, names: LayerNames, tp: int
) -> Iterator[Entry]:
    """Queries, keys, values and output, a piece for each head as the mesh stores it.

    With a gate, each head's rows of the query tensor are its queries and then its gate (Qwen3-Next).
    """
    H, N, G = config.head_dim, config.num_heads, config.num_kv_heads
    layout = head_layout(N, G, tp)
    stored = tuple(head if head < N else -1 for head in range(layout.num_heads))
    rows = 2 * H if config.gate else H
    query = Heads(stored, N, rows, size=H)
    key = Heads(layout.kv_of, G, H)
    parts = {"q": ("q", query), "k": ("k", key)}
    if not config.keys_are_values:
        parts["v"] = ("v", key)
    if config.gate:
        parts["gate"] = ("q", Heads(stored, N, rows, first=H, size=H))
    for part, (tensor, heads) in parts.items():
        yield from heads.project(names.role(part), names.tensor(tensor), width)
        if config.qkv_bias:
            yield from heads.vectors(names.role(f"{part}_bias"), names.tensor(f"{tensor}_bias"))
    yield from Heads(stored, N, H).project_back(names.role("o"), names.tensor("o"), width)
    if config.out_bias:
        yield whole_tensor(names.role("o_bias"), names.tensor("o_bias"), (width,))
    if config.sinks:
        yield from Heads(stored, N, H).scalars(names.role("sinks"), names.tensor("sinks"))
    for part, heads in (("q_norm", Heads(stored, N, H)), ("k_norm", key)):
        if config.qk_norm == "full":
            yield from heads.vectors(names.role(part), names.tensor(part))
        elif config.qk_norm == "head":
            yield whole_tensor(names.role(part), names.tensor(part), (H,))
