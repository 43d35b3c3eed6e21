"""From the config.json of a dense model to that of the mixture it becomes."""

from collections.abc import Mapping
from typing import Any

from moejax.config import AttentionConfig, ModelConfig
from moejax.families.fields import Fields
from moejax.families.known_fields import SHARED_FIELDS
from moejax.families.rope_parameters import rope_fields
from moejax.upcycling.families import DenseFamily

# Of the fields that no family minds, those that are of code which is not copied, or that a dense model has no use for
# and a mixture would heed.
_DROPPED = frozenset({"auto_map", "output_router_logits", "router_aux_loss_coef"})


def sparse_config(
    raw: Mapping[str, Any], family: DenseFamily, config: ModelConfig, experts: int, top_k: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The mixture's config.json, and why each field was dropped that does not carry over.

    Every size is stated, because absent ones mean something else in the other family.

    Args:
        raw: of the dense model.
        family: its family.
        config: what the family reads in it.
        experts: in each layer.
        top_k: experts a token.
    """
    sparse, known = family.sparse, SHARED_FIELDS | family.fields
    reasons = {name: f"a {family.model_type} model does not read it" for name in raw if name not in known}
    reasons |= {name: "of no use to a dense model" for name in raw if name in _DROPPED}
    reasons |= {
        name: f"{sparse.model_type} has no such option; it was off"
        for name in raw
        if name in known and name not in SHARED_FIELDS | sparse.fields
    }
    carried = {name: value for name, value in raw.items() if name not in reasons}
    layer = config.layers[0]
    assert isinstance(layer.mixer, AttentionConfig)
    stated = {
        "architectures": [sparse.architecture],
        "model_type": sparse.model_type,
        **_sizes(config, layer.mixer),
        **family.stated(experts, layer.dense_intermediate_size, layer.mixer.window),
        "num_experts_per_tok": top_k,
    }
    return _with_rope(carried | stated, layer.mixer), reasons


def _sizes(config: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _with_rope(raw: dict[str, Any], attention: AttentionConfig) -> dict[str, Any]:
    """With the base stated, which the families' defaults differ in."""
    if "rope_theta" in raw or "rope_theta" in rope_fields(Fields(raw)).raw:
        return raw
    assert attention.rope is not None
    return raw | {"rope_theta": attention.rope.theta}
