"""Tiny MiniMax-M2 configs."""

from typing import Any

_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "bos_token_id": None,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "scoring_func": "sigmoid",
    "qk_norm_type": "per_layer",
    "use_qk_norm": True,
    "use_routing_bias": True,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # As published: part of a head is turned by `rotary_dim`. 6 experts leave empty slots; the norm goes over 5
    # heads and one key, which divide no mesh; layers left out.
    "minimax_m2_rotary_dim": {
        **_M2,
        "vocab_size": 101,
        "hidden_size": 40,
        "head_dim": 12,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": 17,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "rotary_dim": 8,
        "rope_theta": 10000,
        "num_mtp_modules": 3,
        "use_mtp": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    # Transformers 5's spelling: a stretched quarter of each head, which wins over `rotary_dim`; experts under their
    # other name; the head is the embedding; gelu; three keys for six heads.
    "minimax_m2_quarter": {
        **_M2,
        "vocab_size": 96,
        "hidden_size": 32,
        "head_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_act": "gelu",
        "intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rotary_dim": 8,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.25,
            "factor": 2.0,
        },
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
    # Whole heads are turned by the family's base; all experts of a token are one; as many keys as queries.
    "minimax_m2_whole": {
        **_M2,
        "vocab_size": 64,
        "hidden_size": 48,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
    },
}
