"""Raw configs of tiny PhiMoE models."""

from typing import Any

_PHIMOE = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Two scales: sequences that grow past 16 tokens are run anew; the top-level 64 has no say. All biases, a window, 6
    # experts, 5 heads over one, odd widths; more than the best logit is near enough to share.
    "phimoe_longrope": {
        **_PHIMOE,
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 27,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_local_experts": 6,
        "attention_bias": True,
        "lm_head_bias": True,
        "hidden_dropout": 0.0,
        "input_jitter_noise": 0.01,
        "router_jitter_noise": 0.3,
        "sliding_window": 11,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 2.0],
            "long_factor": [1.0, 2.0, 8.0, 30.0],
            "short_mscale": 1.1,
            "long_mscale": 1.9,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    # No scaling, no biases, no window, tied, the family's jitter; kv heads cut unevenly by the mesh.
    "phimoe_plain": {
        **_PHIMOE,
        "num_hidden_layers": 3,
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "num_local_experts": 5,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    # As published: both scales equal, no jitter to speak of, a window of the whole context, untied, all biases.
    "phimoe_equal_scales": {
        **_PHIMOE,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.0,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.04, 1.5, 2.8],
            "long_factor": [1.02, 4.0, 30.0, 65.0],
            "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 32,
        },
        "dtype": "float32",
    },
}
