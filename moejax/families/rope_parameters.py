"""The rotary embedding of a config.json, in both spellings.

The hub's: `rope_theta` beside `rope_scaling` (whose kind is `type` or `rope_type`). Transformers 5's: everything in
`rope_parameters`. Precedence and defaults are those of transformers' `RotaryEmbeddingConfigMixin`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.config import RopeConfig
from moejax.errors import MoejaxError
from moejax.families.fields import Fields

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
# The keys of mrope spread three positions over the frequencies; in text the three are one.
_KEYS = frozenset(
    "type rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor alpha "
    "short_factor long_factor short_mscale long_mscale mrope_section mrope_interleaved".split()
)


def read_rope(
    fields: Fields,
    default_theta: float,
    max_position_embeddings: int,
    head_dim: int,
    partial_rotary: float | None = None,
    layer_type: str | None = None,
) -> RopeConfig:
    """The config's rotary embedding.

    Args:
        fields: the whole config.json.
        default_theta: the family's base where the config states none.
        max_position_embeddings: tokens; the pretraining context where a scaling states none.
        head_dim: width of a head.
        partial_rotary: the part of a head that is turned where the config states none; None for families that always
            turn whole heads.
        layer_type: for families with one rope for each type of layer, the type; None for those with one for all.

    Raises:
        MoejaxError: an unsupported kind, a part of the head where whole ones are turned, one rope per layer type where
            the family has one for all or the other way round, or a bad value.
    """
    scaling = _scaling(fields, layer_type)
    kind = scaling.raw.get("rope_type", scaling.raw.get("type", "default"))
    if kind not in _KINDS:
        raise MoejaxError(f"{scaling.prefix}rope_type={kind!r} is not supported; one of {', '.join(_KINDS)} is")
    theta = (scaling if "rope_theta" in scaling.raw else fields).number("rope_theta", default_theta)
    if theta <= 1:
        raise MoejaxError(f"config field rope_theta={theta} must be above 1: frequencies fall as its powers")
    if kind == "proportional":
        return _proportional(fields, scaling, RopeConfig(head_dim, theta, kind))
    rope = RopeConfig(dim=_rotated(fields, scaling, head_dim, partial_rotary), theta=theta)
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, kind="linear", factor=scaling.number("factor"))
    if kind == "dynamic":
        if rope.dim == 2:
            raise MoejaxError("rope_type='dynamic' needs head_dim above 2: its exponent is head_dim / (head_dim - 2)")
        return replace(rope, kind="dynamic", factor=scaling.number("factor"))
    original = _original_length(fields, scaling, max_position_embeddings)
    if kind == "llama3":
        return _llama3(scaling, rope, original)
    if kind == "longrope":
        return _longrope(scaling, rope, original, max_position_embeddings)
    return _yarn(scaling, rope, original, max_position_embeddings)


def _rotated(fields: Fields, scaling: Fields, head_dim: int, partial_rotary: float | None) -> int:
    """How many of a head's values are turned."""
    if partial_rotary is not None:
        where = scaling if scaling.raw.get("partial_rotary_factor") is not None else fields
        return int(head_dim * where.number("partial_rotary_factor", partial_rotary))
    for part in (fields, scaling):
        if part.raw.get("partial_rotary_factor") not in (None, 1):
            raise part.error("partial_rotary_factor", "is not supported; whole heads are rotated (1.0)")
    return head_dim


def unknown_rope_keys(raw: Mapping[str, Any]) -> list[str]:
    """Dotted names of the keys inside the rope object, or those of each layer type, that no supported kind reads."""
    outer = rope_fields(Fields(raw))
    inner = [Fields(v, f"{outer.prefix}{k}.") for k, v in outer.raw.items() if isinstance(v, Mapping)]
    return sorted(rope.prefix + key for rope in inner or [outer] for key in rope.raw if key not in _KEYS)


def _scaling(fields: Fields, layer_type: str | None) -> Fields:
    """The rope object, the one that stands for `layer_type`."""
    outer = rope_fields(fields)
    name = outer.prefix[:-1]
    if layer_type is not None:
        inner = outer.raw.get(layer_type)
        if not isinstance(inner, Mapping):
            raise MoejaxError(
                f"config field {name} must hold an object for {layer_type}: there is a rope per layer type"
            )
        return Fields(inner, f"{outer.prefix}{layer_type}.")
    for key, inner in outer.raw.items():
        if isinstance(inner, Mapping):
            raise MoejaxError(f"config field {name}.{key} is an object: one rope per layer type is not supported")
    return outer


def rope_fields(fields: Fields) -> Fields:
    """The rope object that counts, empty where there is none."""
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    value = fields.raw.get(name)
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise fields.error(name, "must be an object or null")
    return Fields(value, prefix=f"{name}.")


def _original_length(fields: Fields, scaling: Fields, max_position_embeddings: int) -> int:
    name = "original_max_position_embeddings"
    # A top-level value wins even over the one inside the rope object (Phi-3's spelling).
    where = fields if fields.raw.get(name) is not None else scaling
    return where.integer(name, max_position_embeddings)


def _proportional(fields: Fields, scaling: Fields, rope: RopeConfig) -> RopeConfig:
    """Frequencies of the whole head's width, of which a part is turned by; 1 where neither place states one."""
    where = scaling if scaling.raw.get("partial_rotary_factor") is not None else fields
    part = where.optional_number("partial_rotary_factor") or 1.0
    if part > 1:
        raise where.error("partial_rotary_factor", "must be at most 1")
    return replace(rope, factor=scaling.number("factor", 1.0), turned_pairs=int(part * rope.dim // 2))


def _llama3(scaling: Fields, rope: RopeConfig, original: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high < low:
        raise scaling.error("high_freq_factor", f"must not be below low_freq_factor={low}")
    return replace(
        rope,
        kind="llama3",
        factor=scaling.number("factor"),
        original_length=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _longrope(scaling: Fields, rope: RopeConfig, original: int, max_position_embeddings: int) -> RopeConfig:
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rope.dim // 2:
            raise MoejaxError(
                f"config field {scaling.prefix}{name} has {len(factors)} numbers for {rope.dim // 2} rotated pairs"
            )
    return replace(
        rope,
        kind="longrope",
        factor=scaling.optional_number("factor") or max_position_embeddings / original,
        original_length=original,
        attention_factor=scaling.optional_number("attention_factor"),
        short_factors=short,
        long_factors=long,
    )


def _yarn(scaling: Fields, rope: RopeConfig, original: int, max_position_embeddings: int) -> RopeConfig:
    # An explicit null asks for the ratio of the contexts (DeepSeek-V3's spelling).
    derived = "factor" in scaling.raw and scaling.raw["factor"] is None
    return replace(
        rope,
        kind="yarn",
        factor=max_position_embeddings / original if derived else scaling.number("factor"),
        original_length=original,
        attention_factor=scaling.optional_number("attention_factor"),
        beta_fast=scaling.optional_number("beta_fast") or 32.0,
        beta_slow=scaling.optional_number("beta_slow") or 1.0,
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )
