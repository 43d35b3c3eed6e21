"""The tensors of multi-head latent attention."""

from collections.abc import Iterator

from moejax.checkpoint.entries import Entry, Heads, LayerNames, linear, whole_tensor
from moejax.config import LatentAttentionConfig, NormConfig
from moejax.nn.heads import head_layout


def latent_attention_entries(
    config: LatentAttentionConfig, norm: NormConfig, width: int, names: LayerNames, tp: int
) -> Iterator[Entry]:
    """Projections into latents as they are, those out of them a piece for each head as the mesh stores it."""
    N, L = config.num_heads, config.kv_rank
    layout = head_layout(N, N, tp)

    def heads(own: int) -> Heads:
        return Heads(layout.kv_of, N, own)

    key = config.nope_dim + config.rope.dim
    into = {"kv_a": L + config.rope.dim}
    if config.query_rank is None:
        yield from heads(key).project(names.role("q"), names.tensor("q"), width)
    else:
        into["q_a"] = config.query_rank
        yield whole_tensor(names.role("q_a_norm"), names.tensor("q_a_norm"), (config.query_rank,))
        yield from heads(key).project(names.role("q_b"), names.tensor("q_b"), config.query_rank)
    for name, size in into.items():
        yield linear(names.role(name), names.tensor(name), width, size)
        if config.bias:
            yield whole_tensor(names.role(f"{name}_bias"), names.tensor(f"{name}_bias"), (size,))
    yield whole_tensor(names.role("kv_a_norm"), names.tensor("kv_a_norm"), (L,))
    yield from heads(config.nope_dim + config.value_dim).project(names.role("kv_b"), names.tensor("kv_b"), L)
    yield from heads(config.value_dim).project_back(names.role("o"), names.tensor("o"), width)
    if config.bias:
        yield whole_tensor(names.role("o_bias"), names.tensor("o_bias"), (width,))
