"""Raw configs of tiny Granite-MoE models."""

from typing import Any

_GRANITE = {
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # All multipliers away from 1 (the scale is not 1 / sqrt(8)), biases, 6 experts, 3 of 6 heads share a kv head, tied.
    "granitemoe_multipliers": {
        **_GRANITE,
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 19,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "attention_bias": True,
        "attention_multiplier": 0.21,
        "embedding_multiplier": 0.4,
        "residual_multiplier": 1.6,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
        "rope_theta": 10000,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "float32",
    },
    # Multipliers, kv heads, rope and biases left to the family: scores are not scaled at all.
    "granitemoe_defaults": {
        **_GRANITE,
        "num_hidden_layers": 3,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "dtype": "float32",
    },
    # Sequences grow past the 32 positions that dynamic scaling knows; every expert is chosen; another activation.
    "granitemoe_dynamic": {
        **_GRANITE,
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 16,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.6,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0},
        "tie_word_embeddings": False,
        "dtype": "float32",
    },
}
