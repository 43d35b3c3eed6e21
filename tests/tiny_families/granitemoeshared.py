"""Raw configs of tiny Granite-MoE models with a shared expert."""

from typing import Any

_SHARED = {
    "architectures": ["GraniteMoeSharedForCausalLM"],
    "model_type": "granitemoeshared",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # A shared expert whose width divides no mesh; all multipliers away from 1, biases, 6 experts, 5 heads over one.
    "granitemoeshared_multipliers": {
        **_SHARED,
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 19,
        "shared_intermediate_size": 21,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "attention_bias": True,
        "attention_multiplier": 0.21,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.8,
        "logits_scaling": 6.0,
        "rope_theta": 10000,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
    # No shared expert; rope stretched by NTK by parts.
    "granitemoeshared_none": {
        **_SHARED,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "dtype": "float32",
    },
    # Tied; another activation in routed and shared experts; the scale of the scores alone is set.
    "granitemoeshared_gelu": {
        **_SHARED,
        "num_hidden_layers": 3,
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 16,
        "shared_intermediate_size": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "attention_multiplier": 0.5,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
