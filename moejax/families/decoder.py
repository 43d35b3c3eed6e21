"""The part of a config.json that all families share: sizes, attention, rope, tokens, and what is refused."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moejax.config import ActivationName, AttentionConfig, LayerConfig, MoEConfig, NormConfig
from moejax.errors import MoejaxError
from moejax.families.fields import Fields
from moejax.families.rope_parameters import read_rope

# transformers' names for functions that are equal in float32; gelu_fast spells sqrt(2/pi) with ten digits.
_ACTIVATIONS: Mapping[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}

_DTYPES = ("float32", "bfloat16", "float16")

# Fields that transformers honours for any model and that would change the numbers: each with the values that do not.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "per_layer_config": (None,),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "mlp_bias": (None, False),
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What transformers fills in for a family's absent fields.

    `num_key_value_heads` None means as many as heads, `head_dim` None the model width divided by them.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10_000.0
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


def read_attention(
    fields: Fields,
    defaults: Defaults,
    *,
    partial_rotary: float | None = None,
    layer_type: str | None = None,
    **switches: Any,
) -> AttentionConfig:
    """Heads, their widths and their rotary embedding from the config; the switches are the family's to read.

    Args:
        fields, defaults: the config and what it leaves out.
        partial_rotary: the family's own `partial_rotary_factor`; None where it turns whole heads and the field has no
            meaning.
        layer_type: which rope of the config, where it holds one for each type of layer.
        switches: further fields of AttentionConfig.
    """
    heads = fields.integer("num_attention_heads", defaults.num_attention_heads)
    head_dim = (
        fields.optional_integer("head_dim", defaults.head_dim)
        or fields.integer("hidden_size", defaults.hidden_size) // heads
    )
    longest = fields.integer("max_position_embeddings", defaults.max_position_embeddings)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads", defaults.num_key_value_heads) or heads,
        head_dim=head_dim,
        rope=read_rope(fields, defaults.rope_theta, longest, head_dim, partial_rotary, layer_type),
        **switches,
    )


def read_decoder(fields: Fields, defaults: Defaults, honours: Collection[str] = ()) -> dict[str, Any]:
    """The ModelConfig fields that every family reads alike, by name.

    Args:
        fields, defaults: the config and what it leaves out.
        honours: fields that other families must refuse and this one reads itself.

    Raises:
        MoejaxError: a value of the wrong kind, or a field that changes the numbers and is not supported.
    """
    _refuse_unsupported(fields, honours)
    return {
        "vocab_size": fields.integer("vocab_size", defaults.vocab_size),
        "hidden_size": fields.integer("hidden_size", defaults.hidden_size),
        "max_position_embeddings": fields.integer("max_position_embeddings", defaults.max_position_embeddings),
        "norm": NormConfig(fields.number("rms_norm_eps", defaults.rms_norm_eps)),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "dtype": _dtype(fields),
        "bos_id": fields.optional_integer("bos_token_id", defaults.bos_token_id, minimum=0),
        "eos_ids": _eos_ids(fields, defaults.eos_token_id),
    }


def decoder_layers(
    attention: AttentionConfig,
    windows: Sequence[int | None],
    moe: Sequence[MoEConfig | None],
    dense_intermediate_size: int = 0,
) -> tuple[LayerConfig, ...]:
    """Layers that differ in their window, and in whether (and which) experts they have, and in nothing else."""
    return tuple(
        LayerConfig(replace(attention, window=window), experts, 0 if experts else dense_intermediate_size)
        for window, experts in zip(windows, moe, strict=True)
    )


def read_activation(fields: Fields, field: str = "hidden_act", default: str = "silu") -> ActivationName:
    """The activation that the config names."""
    name = fields.raw.get(field, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.error(field, f"is not supported; one of {', '.join(_ACTIVATIONS)} is")
    return _ACTIVATIONS[name]


def read_layer_types(fields: Fields, num_layers: int, near: str = "sliding_attention") -> tuple[bool, ...] | None:
    """Whether each layer is of the kind `near` rather than full, where the config lists `layer_types`; else None."""
    kinds = {"full_attention": False, "attention": False, near: True}
    value = fields.raw.get("layer_types")
    if value is None:
        return None
    if not isinstance(value, list) or any(not isinstance(kind, str) for kind in value):
        raise fields.error("layer_types", "must be a list of names or null")
    for layer, kind in enumerate(value):
        if kind not in kinds:
            raise MoejaxError(
                f"config field layer_types[{layer}]={kind!r} is not supported; full_attention and {near} are"
            )
    if len(value) != num_layers:
        raise MoejaxError(f"config field layer_types names {len(value)} layers but num_hidden_layers={num_layers}")
    return tuple(kinds[kind] for kind in value)


def uniform_windows(fields: Fields, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    """The same window in every layer, for families whose attention reads no `layer_types`.

    Their masks ignore the list but transformers' cache follows it, so a list that says otherwise has no one meaning.
    """
    windowed = read_layer_types(fields, num_layers)
    if windowed is not None and any(layer != (window is not None) for layer in windowed):
        raise MoejaxError(
            f"config field layer_types contradicts sliding_window={window}, which this family applies to every layer; "
            "remove layer_types"
        )
    return (window,) * num_layers


def no_windows(fields: Fields, num_layers: int) -> tuple[None, ...]:
    """No window in any layer, for families whose attention has none.

    Their masks ignore a `sliding_window` but transformers' cache follows it: there is no one answer to reproduce.
    """
    if fields.raw.get("sliding_window") is not None:
        raise fields.error("sliding_window", f"is not supported for {fields.raw.get('model_type')}; set it to null")
    uniform_windows(fields, None, num_layers)
    return (None,) * num_layers


def _refuse_unsupported(fields: Fields, honours: Collection[str]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if name not in honours and fields.raw.get(name) not in harmless:
            raise fields.error(name, "is not supported and would change the numbers")


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(name)
    if value is None:
        return "float32"
    if value not in _DTYPES:
        raise fields.error(name, f"is not supported; one of {', '.join(_DTYPES)} is")
    return value


def _eos_ids(fields: Fields, default: int | None) -> tuple[int, ...]:
    if isinstance(fields.raw.get("eos_token_id"), list):
        ids = fields.integers("eos_token_id")
        if any(token < 0 for token in ids):
            raise fields.error("eos_token_id", "must hold token ids of at least 0")
        return ids
    one = fields.optional_integer("eos_token_id", default, minimum=0)
    return () if one is None else (one,)
