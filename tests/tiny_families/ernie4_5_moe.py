"""Tiny Ernie 4.5 configs."""

from typing import Any

_ERNIE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Biases in attention, dense layers, shared experts and head, odd widths throughout; every second layer sparse
    # between two indices; 6 experts leave empty slots; 5 heads over one key; layers left out.
    "ernie4_5_moe_biases": {
        **_ERNIE,
        "vocab_size": 101,
        "hidden_size": 40,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": 45,
        "moe_intermediate_size": 17,
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_num_shared_experts": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_layer_interval": 2,
        "moe_capacity": [6, 6, 6],
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 1,
        "use_bias": True,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    # Transformers 5's spelling: a stretched rope; the head is the embedding, as an absent field has it, and has a bias;
    # no shared expert; sums that a floor bounds; aliases of sizes; heads wider than the model; gelu.
    "ernie4_5_moe_floor": {
        **_ERNIE,
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "head_dim": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_act": "gelu",
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_norm_min": 0.6,
        "use_bias": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0},
        "dtype": "float32",
    },
    # As published: no biases, a dense layer first, two shared experts, one expert of five a token.
    "ernie4_5_moe_plain": {
        **_ERNIE,
        "vocab_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 33,
        "moe_intermediate_size": 16,
        "moe_num_experts": 5,
        "moe_k": 1,
        "rope_theta": 500000,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
}
