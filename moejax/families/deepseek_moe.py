"""What the families whose mixture of experts is DeepSeek's share: fields, routers, tensor names, layers left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moejax.config import MoEConfig, RouterConfig
from moejax.families.decoder import read_activation
from moejax.families.family import DEFAULT_NAMES
from moejax.families.fields import Fields


@dataclass(frozen=True, slots=True)
class MoEDefaults:
    """What transformers fills in for a family's absent fields; 0 where a config has to say.

    `alias` is the other name that a config may have for `n_routed_experts`; it wins where both stand.
    """

    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 1408
    n_shared_experts: int = 1
    first_k_dense_replace: int = 0
    alias: str = "num_local_experts"


def read_moe(
    fields: Fields, num_layers: int, defaults: MoEDefaults, router: RouterConfig, hidden_size: int
) -> list[MoEConfig | None]:
    """The experts of each layer, None for the first `first_k_dense_replace`.

    Shared experts have no gate, and several of them are one MLP as wide as all together.
    """
    dense = fields.integer("first_k_dense_replace", defaults.first_k_dense_replace, minimum=0)
    if dense >= num_layers:
        return [None] * num_layers
    name = defaults.alias if defaults.alias in fields.raw else "n_routed_experts"
    width = fields.integer("moe_intermediate_size", defaults.moe_intermediate_size)
    shared = fields.integer("n_shared_experts", defaults.n_shared_experts, minimum=0)
    moe = MoEConfig(
        hidden_size=hidden_size,
        intermediate_size=width,
        num_experts=fields.integer(name, defaults.n_routed_experts),
        num_experts_per_tok=fields.integer("num_experts_per_tok", defaults.num_experts_per_tok),
        activation=read_activation(fields),
        router=router,
        shared_intermediate_size=width * shared,
    )
    return [None] * dense + [moe] * (num_layers - dense)


def sigmoid_router(
    fields: Fields, *, groups: int = 1, kept_groups: int = 1, renormalise: bool = True, scale: float = 1.0
) -> RouterConfig:
    """DeepSeek-V3's router; the arguments are what the family's absent fields mean.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2, as transformers computes it
    (`DeepseekV3TopkRouter`).
    """
    return RouterConfig(
        score="sigmoid",
        correction=True,
        groups=fields.integer("n_group", groups),
        kept_groups=fields.integer("topk_group", kept_groups),
        group_score="top2",
        masked_score=-float("inf"),
        renormalise=fields.flag("norm_topk_prob", renormalise),
        epsilon=1e-20,
        scale=fields.number("routed_scaling_factor", scale),
    )


def further_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """The layers behind the last one, which predict further tokens.

    Args:
        raw: the config, which may say how many such layers there are; where it doesn't there may be one.
        num_layers: what an absent `num_hidden_layers` means.
    """
    fields = Fields(raw)
    first = fields.integer("num_hidden_layers", num_layers)
    counts = [fields.optional_integer(name, minimum=0) or 0 for name in _FURTHER if name in raw]
    return tuple(f"model.layers.{first + index}.*" for index in range(max(counts, default=1)))


def refuse_unread(fields: Fields, scoring: str, method: str | None = None) -> None:
    """Refuses what DeepSeek's own code reads and transformers' models don't, unless it says what they do anyway."""
    for name, value in (("scoring_func", scoring), ("moe_layer_freq", 1), ("topk_method", method)):
        if value is not None and fields.raw.get(name) not in (None, value):
            raise fields.error(name, f"is not supported; {value} is")


_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules")
_MLP = "model.layers.{l}.mlp."

DEEPSEEK_NAMES: Mapping[str, str] = {
    **DEFAULT_NAMES,
    "layers.{l}.moe.correction": _MLP + "gate.e_score_correction_bias",
    "layers.{l}.moe.shared.gate": _MLP + "shared_experts.gate_proj.weight",
    "layers.{l}.moe.shared.up": _MLP + "shared_experts.up_proj.weight",
    "layers.{l}.moe.shared.down": _MLP + "shared_experts.down_proj.weight",
}

DEEPSEEK_FIELDS = frozenset(
    "n_routed_experts num_local_experts n_shared_experts moe_intermediate_size first_k_dense_replace n_group "
    "topk_group norm_topk_prob routed_scaling_factor num_nextn_predict_layers num_mtp_layers".split()
)

ORIGINAL_FIELDS = frozenset("scoring_func moe_layer_freq topk_method ep_size aux_loss_alpha seq_aux".split())
"""Of the configs as DeepSeek publishes them, whose own code reads them."""
