"""The supported checkpoint families: from a parsed config.json to a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families.deepseek_v2 import DEEPSEEK_V2
from moejax.families.deepseek_v3 import DEEPSEEK_V3
from moejax.families.dots1 import DOTS1
from moejax.families.ernie4_5_moe import ERNIE4_5_MOE
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.gemma4 import GEMMA4
from moejax.families.glm4_moe import GLM4_MOE
from moejax.families.gpt_oss import GPT_OSS
from moejax.families.granitemoe import GRANITEMOE, GRANITEMOESHARED
from moejax.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moejax.families.known_fields import SHARED_FIELDS
from moejax.families.llama4 import LLAMA4
from moejax.families.minimax_m2 import MINIMAX_M2
from moejax.families.mixtral import MIXTRAL
from moejax.families.olmoe import OLMOE
from moejax.families.phimoe import PHIMOE
from moejax.families.qwen2_moe import QWEN2_MOE
from moejax.families.qwen3_5_moe import QWEN3_5_MOE
from moejax.families.qwen3_moe import QWEN3_MOE
from moejax.families.qwen3_next import QWEN3_NEXT
from moejax.families.rope_parameters import unknown_rope_keys

__all__ = ["DEFAULT_NAMES", "FAMILIES", "Family", "family_of", "read_config", "text_config", "unknown_fields"]

_ALL = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GPT_OSS,
    LLAMA4,
    GRANITEMOE,
    GRANITEMOESHARED,
    HUNYUAN_V1_MOE,
    PHIMOE,
    GEMMA4,
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    MINIMAX_M2,
    ERNIE4_5_MOE,
    QWEN3_NEXT,
    QWEN3_5_MOE,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

_BY_NAME = {name: family for family in _ALL for name in (family.model_type, *family.aliases)}
_BY_WRAPPER = {family.wrapper.model_type: family for family in _ALL if family.wrapper}


def family_of(model_type: Any) -> Family:
    """The family that a config.json's `model_type` names (None where it names none), itself or wrapped.

    Raises:
        MoejaxError: no such family.
    """
    supported = f"supported are {', '.join(_BY_NAME | _BY_WRAPPER)}"
    if model_type is None:
        raise MoejaxError(f"the config has no model_type; {supported}")
    if not isinstance(model_type, str) or model_type not in _BY_NAME | _BY_WRAPPER:
        raise MoejaxError(f"model_type={model_type!r} is not supported; {supported}")
    return _BY_NAME.get(model_type) or _BY_WRAPPER[model_type]


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: `raw` itself, or the `text_config` of a model of several modalities.

    Raises:
        MoejaxError: no JSON object, an unknown family, or a wrapper without a text_config.
    """
    if not isinstance(raw, Mapping):
        raise MoejaxError(f"a config must be a JSON object, got {type(raw).__name__}")
    model_type = raw.get("model_type")
    family = family_of(model_type)
    if model_type not in _BY_WRAPPER:
        return raw
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        raise MoejaxError(f"the config of model_type={model_type!r} has no text_config, which describes its text model")
    # What describes the files stands outside; the text config's own word wins. But embeddings that either ties are
    # tied: transformers writes an inner false beside the outer true that its wrapper heeds. Files settle the matter.
    outer = {name: raw[name] for name in _OUTER_FIELDS if name in raw}
    fixed: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    if raw.get("tie_word_embeddings") is True:
        fixed["tie_word_embeddings"] = True
    return outer | dict(inner) | fixed


_OUTER_FIELDS = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "transformers_version")


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A parsed config.json, in the hub's spelling or in that of transformers 5, as a ModelConfig.

    Absent fields take the defaults that transformers gives the family.

    Raises:
        MoejaxError: an unknown family, a value of the wrong kind, or a field that changes the numbers and is not
            supported; the message names the field and its value.
    """
    text = text_config(raw)
    return family_of(text.get("model_type")).to_config(text)


def unknown_fields(raw: Mapping[str, Any]) -> list[str]:
    """Names, sorted, of the config.json fields that neither transformers' base config nor the family knows.

    They have no effect here, nor in transformers. Keys inside the rope object are dotted. Of a model of several
    modalities only the text config counts.
    """
    text = text_config(raw)
    known = SHARED_FIELDS | family_of(text.get("model_type")).fields
    return sorted(set(text) - known) + unknown_rope_keys(text)
