"""Llama 4's config.json: what it becomes, and what is refused."""

import pytest

from moejax.config import AttentionConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import read_config, text_config, unknown_fields

SMALL = {"model_type": "llama4_text", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = RopeConfig(128, theta=500_000.0, interleaved=True)


def read(**fields):
    return read_config({**SMALL, "num_hidden_layers": 4, **fields})


def test_absent_fields_take_transformers_defaults():
    config = read_config({"model_type": "llama4_text"})
    turned = AttentionConfig(40, 8, 128, chunk=8192, rope=ROPE, qk_norm="unit", norm_after_rope=True)
    still = AttentionConfig(40, 8, 128, temperature=(8192.0, 0.1))
    assert [layer.mixer for layer in config.layers] == ([turned] * 3 + [still]) * 12
    moe = config.layers[0].moe
    assert moe and config.sparse == tuple(range(48))
    assert (moe.num_experts, moe.num_experts_per_tok, moe.intermediate_size) == (16, 1, 8192)
    assert moe.scales_input and moe.shared_intermediate_size == 8192 and not moe.shared_gate
    assert moe.router == RouterConfig(score="none", weigh="sigmoid", renormalise=False)
    assert (config.vocab_size, config.max_position_embeddings, config.norm.eps) == (202_048, 131_072, 1e-5)
    assert (config.bos_id, config.eos_ids, config.tie_word_embeddings) == (1, (2,), False)


def test_dense_layers():
    config = read(interleave_moe_layer_step=2)
    assert config.sparse == (1, 3) and config.layers[0].dense_intermediate_size == 16_384
    assert read(interleave_moe_layer_step=2, moe_layers=[0]).sparse == (0,)
    assert read(moe_layers=[]).sparse == ()


def test_layers_without_rope_need_not_be_the_full_ones():
    kinds = ["chunked_attention", "full_attention", "full_attention", "chunked_attention"]
    config = read(no_rope_layers=[1, 0, 1, 0], layer_types=kinds, attention_chunk_size=16)
    assert [layer.mixer.chunk for layer in config.layers] == [16, None, None, 16]
    assert [layer.mixer.rope is None for layer in config.layers] == [False, True, False, True]
    assert [layer.mixer.qk_norm for layer in config.layers] == ["unit", "none", "unit", "none"]
    assert read(no_rope_layers=[]).layers[3].mixer.rope is None  # as if absent


def test_a_wrapper_is_read_by_its_text_config():
    wrapped = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 7},
        "text_config": {**SMALL, "num_hidden_layers": 2},
    }
    assert read_config(wrapped) == read(num_hidden_layers=2, torch_dtype="bfloat16")
    assert text_config(wrapped)["architectures"] == ["Llama4ForCausalLM"]
    assert unknown_fields(wrapped) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] must have a value for each of 4 layers"),
        ({"attention_chunk_size": None}, "attention_chunk_size=null must be a whole number of at least 1"),
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention and chunked_attention are"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(**fields)
    assert message in str(refusal.value)


def test_a_wrapper_without_a_text_config_is_refused():
    with pytest.raises(MoejaxError, match="has no text_config"):
        read_config({"model_type": "llama4"})
