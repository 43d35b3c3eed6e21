"""The dense families that can be upcycled, each with the sparse family that computes the same from the same tensors.

A dense model is read as one of its sparse family whose layers are all dense: attention, norms, rope, embeddings and the
names of their tensors are the same. What its config says and the sparse family cannot express is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families.decoder import (
    Defaults,
    decoder_layers,
    no_windows,
    read_activation,
    read_attention,
    read_decoder,
    read_layer_types,
    uniform_windows,
)
from moejax.families.family import Family
from moejax.families.fields import Fields
from moejax.families.mixtral import MIXTRAL
from moejax.families.qwen3_moe import QWEN3_MOE

Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class DenseFamily:
    """A family of dense checkpoints in Hugging Face's format.

    Attributes:
        model_type: `model_type` of its config.json.
        sparse: what its models become.
        defaults: what transformers fills in for absent fields, and for `intermediate_size` the next one.
        intermediate_size: of the MLP.
        attention: the family's own switches of attention, fields of AttentionConfig.
        windows: the window of each layer, of which the sparse family has one for all or none.
        fields: names of config.json's fields that are read beyond those all families share.
        stated: (number of experts, their width, window) -> the sparse config's own fields.
    """

    model_type: str
    sparse: Family
    defaults: Defaults
    intermediate_size: int
    attention: Callable[[Fields], dict[str, Any]]
    windows: Callable[[Fields, int], Windows]
    fields: frozenset[str]
    stated: Callable[[int, int, int | None], dict[str, Any]]

    def to_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """A parsed config.json as a model of the sparse family with dense layers only.

        Raises:
            MoejaxError: a value of the wrong kind, or one that changes the numbers and has no counterpart.
        """
        fields = Fields(raw)
        if raw.get("quantization_config") is not None:
            raise MoejaxError("config field quantization_config is there: take the checkpoint's unquantised version")
        num_layers = fields.integer("num_hidden_layers", self.defaults.num_hidden_layers)
        layers = decoder_layers(
            read_attention(fields, self.defaults, **self.attention(fields)),
            self.windows(fields, num_layers),
            [None] * num_layers,
            fields.integer("intermediate_size", self.intermediate_size),
        )
        decoder = read_decoder(fields, self.defaults)
        activation = read_activation(fields)
        return ModelConfig(model_type=self.sparse.model_type, layers=layers, activation=activation, **decoder)


def dense_family_of(model_type: Any) -> DenseFamily:
    """The dense family that a config.json's `model_type` names.

    Raises:
        MoejaxError: it is none.
    """
    known = {family.model_type: family for family in DENSE}
    if model_type not in known:
        raise MoejaxError(f"model_type={model_type!r} cannot be upcycled; dense models of {', '.join(known)} can")
    return known[model_type]


def _llama_attention(fields: Fields) -> dict[str, Any]:
    if fields.flag("attention_bias", False):
        raise fields.error("attention_bias", "has no counterpart: attention has no biases in mixtral")
    return {}


def _qwen3_attention(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": "head"}


def _mistral_windows(fields: Fields, num_layers: int) -> Windows:
    return uniform_windows(fields, fields.optional_integer("sliding_window", 4096), num_layers)


def _qwen3_windows(fields: Fields, num_layers: int) -> Windows:
    """As listed, or else in the layers from `max_window_layers` on."""
    listed = read_layer_types(fields, num_layers)
    limit = fields.integer("max_window_layers", 28, minimum=0)
    windowed = listed or tuple(layer >= limit for layer in range(num_layers))
    window = fields.optional_integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    if window is None:
        if listed is not None and any(listed):
            raise fields.error("layer_types", "lists sliding_attention, but there is no window (use_sliding_window)")
        return (None,) * num_layers
    if any(windowed) and not all(windowed):
        name = "max_window_layers" if listed is None else "layer_types"
        raise fields.error(name, f"has no counterpart: all {num_layers} layers have a window in qwen3_moe, or none")
    return (window if all(windowed) else None,) * num_layers


def _mixtral_fields(experts: int, width: int, window: int | None) -> dict[str, Any]:
    return {"num_local_experts": experts, "intermediate_size": width, "sliding_window": window}


def _qwen3_moe_fields(experts: int, width: int, window: int | None) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


LLAMA = DenseFamily(
    model_type="llama",
    sparse=MIXTRAL,
    defaults=Defaults(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
    ),
    intermediate_size=11_008,
    attention=_llama_attention,
    windows=no_windows,
    fields=frozenset({"attention_bias"}),
    stated=_mixtral_fields,
)

MISTRAL = DenseFamily(
    model_type="mistral",
    sparse=MIXTRAL,
    defaults=Defaults(
        vocab_size=32_000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
    ),
    intermediate_size=14_336,
    attention=lambda fields: {},
    windows=_mistral_windows,
    fields=frozenset({"sliding_window"}),
    stated=_mixtral_fields,
)

QWEN3 = DenseFamily(
    model_type="qwen3",
    sparse=QWEN3_MOE,
    defaults=Defaults(
        vocab_size=151_936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        head_dim=128,
    ),
    intermediate_size=22_016,
    attention=_qwen3_attention,
    windows=_qwen3_windows,
    fields=frozenset("attention_bias use_sliding_window sliding_window max_window_layers".split()),
    stated=_qwen3_moe_fields,
)

DENSE = (LLAMA, MISTRAL, QWEN3)
