"""Multi-head latent attention as DeepSeek's configs describe it."""

import math
from dataclasses import replace

from moejax.config import LatentAttentionConfig
from moejax.families.decoder import Defaults, no_windows
from moejax.families.fields import Fields
from moejax.families.rope_parameters import read_rope, rope_fields

LATENT_ATTENTION_FIELDS = frozenset(
    "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim attention_bias "
    "sliding_window".split()
)


def read_latent_attention(fields: Fields, defaults: Defaults, *, interleaved: bool) -> LatentAttentionConfig:
    """The attention of every layer; absent widths are DeepSeek's.

    Args:
        fields, defaults: the config and what it leaves out.
        interleaved: whether neighbouring values turn together.

    Raises:
        MoejaxError: a number of key/value heads other than that of heads, windows, or a bad value.
    """
    heads = fields.integer("num_attention_heads", defaults.num_attention_heads)
    if fields.raw.get("num_key_value_heads") not in (None, heads):
        raise fields.error("num_key_value_heads", f"must be num_attention_heads={heads}: each head has keys of its own")
    no_windows(fields, fields.integer("num_hidden_layers", defaults.num_hidden_layers))
    longest = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    nope, turned = fields.integer("qk_nope_head_dim", 128), fields.integer("qk_rope_head_dim", 64)
    return LatentAttentionConfig(
        num_heads=heads,
        kv_rank=fields.integer("kv_lora_rank", 512),
        query_rank=fields.optional_integer("q_lora_rank", 1536),
        nope_dim=nope,
        value_dim=fields.integer("v_head_dim", 128),
        rope=replace(read_rope(fields, defaults.rope_theta, longest, turned), interleaved=interleaved),
        scale=(nope + turned) ** -0.5 * _sharpening(rope_fields(fields)),
        bias=fields.flag("attention_bias", False),
    )


def _sharpening(rope: Fields) -> float:
    """What a stretched context multiplies the scores by, whatever stretches it: the square of YaRN's mscale.

    Source: transformers' `yarn_apply_mscale`.
    """
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    every_dim = None if kind == "default" else rope.optional_number("mscale_all_dim")
    if every_dim is None:
        return 1.0
    return (0.1 * every_dim * math.log(max(rope.number("factor"), 1.0)) + 1.0) ** 2
