"""Raw configs of tiny Hunyuan-v1-MoE models."""

from typing import Any

_HUNYUAN = {
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "model_type": "hunyuan_v1_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Each layer chooses another number of its 6 experts; a base stretched by alpha; biases; 5 heads; odd widths; tied.
    "hunyuan_v1_moe_alpha": {
        **_HUNYUAN,
        "num_hidden_layers": 3,
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 27,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "attention_head_dim": 8,
        "attention_bias": True,
        "num_experts": 6,
        "moe_topk": [3, 1, 2],
        "moe_intermediate_size": [27, 27, 27],
        "num_shared_expert": [1, 1, 1],
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    # Aliases, which win; no alpha, so that sequences past 32 tokens stretch the base; key/value heads left out.
    "hunyuan_v1_moe_dynamic": {
        **_HUNYUAN,
        "num_hidden_layers": 2,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "head_dim": 12,
        "num_experts": 3,
        "num_local_experts": 8,
        "moe_topk": 1,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 2000.0, "factor": 3.0},
        "dtype": "float32",
    },
    # One expert, always chosen, as the family's defaults have it; 6 heads over 3; another activation.
    "hunyuan_v1_moe_one_expert": {
        **_HUNYUAN,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-3,
        "dtype": "float32",
    },
}
