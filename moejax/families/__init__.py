"""The supported checkpoint families: from a parsed config.json to a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.families.family import DEFAULT_NAMES, Family
from moejax.families.known_fields import SHARED_FIELDS
from moejax.families.mixtral import MIXTRAL
from moejax.families.olmoe import OLMOE
from moejax.families.qwen2_moe import QWEN2_MOE
from moejax.families.qwen3_moe import QWEN3_MOE
from moejax.families.rope_parameters import unknown_rope_keys

__all__ = ["DEFAULT_NAMES", "FAMILIES", "Family", "family_of", "read_config", "unknown_fields"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)}


def family_of(model_type: Any) -> Family:
    """The family that a config.json's `model_type` names (None where it names none).

    Raises:
        MoejaxError: no such family.
    """
    supported = f"supported are {', '.join(FAMILIES)}"
    if model_type is None:
        raise MoejaxError(f"the config has no model_type; {supported}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MoejaxError(f"model_type={model_type!r} is not supported; {supported}")
    return FAMILIES[model_type]


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A parsed config.json, in the hub's spelling or in that of transformers 5, as a ModelConfig.

    Absent fields take the defaults that transformers gives the family.

    Raises:
        MoejaxError: an unknown family, a value of the wrong kind, or a field that changes the numbers and is not
            supported; the message names the field and its value.
    """
    if not isinstance(raw, Mapping):
        raise MoejaxError(f"a config must be a JSON object, got {type(raw).__name__}")
    return family_of(raw.get("model_type")).to_config(raw)


def unknown_fields(raw: Mapping[str, Any]) -> list[str]:
    """Names, sorted, of the config.json fields that neither transformers' base config nor the family knows.

    They have no effect here, nor in transformers. Keys inside the rope object are dotted.
    """
    known = SHARED_FIELDS | family_of(raw.get("model_type")).fields
    return sorted(set(raw) - known) + unknown_rope_keys(raw)
