"""What the two Qwen families share: which layers are sparse, and their experts."""

from typing import Any

from moejax.config import MoEConfig, RouterConfig
from moejax.families.decoder import read_activation
from moejax.families.fields import Fields


def read_sparse(fields: Fields, num_experts: int, num_layers: int) -> tuple[bool, ...]:
    """Which layers are a mixture of experts; the others are a dense MLP of width `intermediate_size`."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    return tuple(num_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def read_moe(
    fields: Fields,
    num_layers: int,
    *,
    hidden_size: int,
    num_experts: int,
    intermediate_size: int,
    num_experts_per_tok: int,
    renormalise: bool = False,
    **switches: Any,
) -> list[MoEConfig | None]:
    """The experts of each layer, None where it is dense; the sizes are the family's defaults, except `hidden_size` and
    `num_experts`."""
    sparse = read_sparse(fields, num_experts, num_layers)
    if not any(sparse):
        return [None] * num_layers
    moe = MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("moe_intermediate_size", intermediate_size),
        num_experts=num_experts,
        num_experts_per_tok=fields.integer("num_experts_per_tok", num_experts_per_tok),
        activation=read_activation(fields),
        router=RouterConfig(renormalise=fields.flag("norm_topk_prob", renormalise)),
        **switches,
    )
    return [moe if layer else None for layer in sparse]
