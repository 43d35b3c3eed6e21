"""Raw configs of tiny Granite-MoE models with a shared expert."""

from typing import Any

from tests.tiny_families import granitemoe

_SHARED = {"architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared"}

CONFIGS: dict[str, dict[str, Any]] = {
    # A shared expert whose width divides no mesh, beside everything of the plain family's first config.
    "granitemoeshared_multipliers": {
        **granitemoe.CONFIGS["granitemoe_multipliers"],
        **_SHARED,
        "shared_intermediate_size": 21,
    },
    # No shared expert; rope stretched by NTK by parts.
    "granitemoeshared_none": {
        **granitemoe.CONFIGS["granitemoe_defaults"],
        **_SHARED,
        "shared_intermediate_size": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "granitemoeshared_dynamic": {
        **granitemoe.CONFIGS["granitemoe_dynamic"],
        **_SHARED,
        "shared_intermediate_size": 32,
    },
}
