"""What the two Qwen families share: which layers are sparse, and their experts."""

from moejax.config import MoEConfig, RouterConfig
from moejax.families.decoder import read_activation
from moejax.families.fields import Fields


def read_sparse(fields: Fields, num_experts: int, num_layers: int) -> tuple[bool, ...]:
    """Which layers are a mixture of experts; the others are a dense MLP of width `intermediate_size`."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    return tuple(num_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def read_experts(
    fields: Fields,
    *,
    hidden_size: int,
    num_experts: int,
    intermediate_size: int,
    num_experts_per_tok: int,
    shared_intermediate_size: int = 0,
) -> MoEConfig:
    """The experts of a sparse layer; the sizes are the family's defaults, except `hidden_size` and `num_experts`."""
    per_token = fields.integer("num_experts_per_tok", num_experts_per_tok)
    if not num_experts:
        # No layer is sparse and nothing of this block is built, but it must still be a valid block.
        num_experts = per_token = 1
    return MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("moe_intermediate_size", intermediate_size),
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        activation=read_activation(fields),
        router=RouterConfig(renormalise=fields.flag("norm_topk_prob", False)),
        shared_intermediate_size=shared_intermediate_size,
        shared_gate=shared_intermediate_size > 0,
    )
