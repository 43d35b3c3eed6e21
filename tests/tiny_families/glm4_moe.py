"""Tiny GLM-4.5 configs."""

from typing import Any

_GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "eos_token_id": [2, 3],
    "pad_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # Two of three groups of 2 experts, 3 chosen; 6 experts leave empty slots; two shared experts of an odd width; half
    # of each head turned; biases and norms of heads; 5 heads over one key; a leading dense layer; layers left out.
    "glm4_moe_groups": {
        **_GLM,
        "vocab_size": 101,
        "hidden_size": 40,
        "head_dim": 12,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": 45,
        "moe_intermediate_size": 17,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 3,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    # Transformers 5's spelling: a stretched quarter of each head is turned, experts under their other name; sums are
    # not renormalised; two dense layers; the head is the embedding; gelu.
    "glm4_moe_quarter": {
        **_GLM,
        "vocab_size": 96,
        "hidden_size": 32,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "gelu",
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 2,
        "num_mtp_layers": 0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.25,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    # No dense layer; one expert of five a token, in one group; whole heads turned, linearly stretched; as many keys as
    # queries, whose number divides no mesh; the rest is the family's.
    "glm4_moe_sparse": {
        **_GLM,
        "vocab_size": 64,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 0,
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    # One of two groups kept, all of whose experts are chosen; three keys for six heads; three shared experts. Half of
    # a head of 10 is no whole number of pairs: 6 values turn.
    "glm4_moe_one_group": {
        **_GLM,
        "vocab_size": 96,
        "hidden_size": 32,
        "head_dim": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_shared_experts": 3,
        "n_group": 2,
        "topk_group": 1,
        "attention_bias": True,
        "rope_theta": 1000000,
    },
}
