"""Tiny GPT-OSS models. Widths are multiples of 32 where experts are to be packed as MXFP4."""

_COMMON = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "eos_token_id": [2, 3, 4],
    "pad_token_id": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}

CONFIGS = {
    # 6 experts on ep=4, hidden width 3 blocks of 32 on tp=2, 6 heads on 2; a limit that clamps; YaRN not truncated.
    "gpt_oss_clamped": {
        **_COMMON,
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "swiglu_limit": 1.1,
        "swiglu_alpha": 1.3,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    # Every second layer full, starting with a window; the rope of the family; tied; odd widths; all experts chosen.
    "gpt_oss_defaults": {
        **_COMMON,
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 21,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
    # Layer types as listed, no attention biases, one key/value head, default rope.
    "gpt_oss_listed": {
        **_COMMON,
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 37,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 16,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
