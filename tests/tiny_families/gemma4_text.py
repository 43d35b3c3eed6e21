"""Tiny configs of Gemma-4; see tests/tiny_configs.py."""

from typing import Any

_BASE = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "enable_moe_block": True,
    "eos_token_id": [1, 2],
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}

# What transformers records of its router.
ROUTER_GIVES = "probabilities"

CONFIGS: dict[str, dict[str, Any]] = {
    # Everything that the published model has: wider heads, fewer of them and values from keys in the full layers, of
    # whose heads a quarter is turned. 6 experts, 6 heads over 3, which ep=4 or tp=4 does not divide; the last layer,
    # listed as windowed, sees all.
    "gemma4_text_published": {
        **_BASE,
        "attention_k_eq_v": True,
        "dtype": "float32",
        "final_logit_softcapping": 10.0,
        "global_head_dim": 16,
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "intermediate_size": 21,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "moe_intermediate_size": 12,
        "num_attention_heads": 6,
        "num_experts": 6,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "num_kv_shared_layers": 0,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": 101,
        "vocab_size_per_layer_input": 101,
    },
    # As transformers 5 writes it: sizes of single layers layer by layer. A head of its own, biases, values of their
    # own, a proportional rope that is stretched too, and another kind of rope in the windowed layers.
    "gemma4_text_per_layer": {
        **_BASE,
        "attention_bias": True,
        "dtype": "float32",
        "head_dim": 12,
        "hidden_activation": "silu",
        "hidden_size": 40,
        "intermediate_size": 33,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "moe_intermediate_size": 20,
        "num_attention_heads": 4,
        "num_experts": 5,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "per_layer_config": {"2": {"head_dim": 20, "num_key_value_heads": 4}},
        "rope_parameters": {
            "full_attention": {
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
                "rope_theta": 1e4,
                "rope_type": "proportional",
            },
            "sliding_attention": {"factor": 4.0, "rope_theta": 1e4, "rope_type": "linear"},
        },
        "sliding_window": 16,
        "tie_word_embeddings": False,
        "top_k_experts": 3,
        "vocab_size": 96,
    },
    # What the hub's spelling leaves out: the pattern of five windowed layers and a full one, both ropes, the window
    # (512) and the sizes of full layers' heads, where num_global_key_value_heads has no say without attention_k_eq_v.
    "gemma4_text_defaults": {
        **_BASE,
        "global_head_dim": 16,
        "head_dim": 8,
        "hidden_size": 48,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_attention_heads": 5,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 7,
        "num_key_value_heads": 5,
        "sliding_window": 5,
        "tie_word_embeddings": False,
        "top_k_experts": 1,
        "torch_dtype": "float32",
        "vocab_size": 96,
    },
    # No experts at all: the dense models of the family. Embeddings are tied where nothing is said.
    "gemma4_text_dense": {
        **_BASE,
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 16,
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 50,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "vocab_size": 64,
    },
}
