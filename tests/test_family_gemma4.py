"""Gemma-4's config.json: what it becomes, and what is refused."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import read_config, text_config, unknown_fields

SMALL = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24}
NEAR = AttentionConfig(8, 4, 256, window=512, rope=RopeConfig(256), scale=1.0, qk_norm="head", value_norm=True)
FAR = AttentionConfig(
    8,
    4,
    512,
    rope=RopeConfig(512, theta=1e6, kind="proportional", turned_pairs=64),
    scale=1.0,
    qk_norm="head",
    value_norm=True,
)


def read(**fields):
    return read_config({**SMALL, "num_hidden_layers": 3, **fields})


def heads(config):
    return [(layer.mixer.head_dim, layer.mixer.num_kv_heads) for layer in config.layers]


def test_absent_fields_take_transformers_defaults():
    """Literals from transformers 5.23's configuration class."""
    config = read_config(SMALL)
    assert [layer.mixer for layer in config.layers] == ([NEAR] * 5 + [FAR]) * 5
    assert config.layers[0].branch_norms and config.layers[0].output_scale and config.sparse == ()
    assert (config.layers[0].dense_intermediate_size, config.activation) == (9216, "gelu_tanh")
    assert config.norm == NormConfig(1e-6, "rms_wide")
    assert (config.vocab_size, config.hidden_size, config.max_position_embeddings) == (262_144, 2304, 131_072)
    assert (config.embedding_scale, config.logits_softcap) == (48.0, None)
    assert (config.bos_id, config.eos_ids, config.tie_word_embeddings) == (2, (1,), True)


def test_experts_stand_beside_the_dense_mlp():
    layer = read(**EXPERTS, intermediate_size=40).layers[0]
    router = RouterConfig(expert_scale=True)
    assert layer.moe == MoEConfig(2304, 24, 8, 2, activation="gelu_tanh", router=router)
    assert layer.dense_intermediate_size == 40 and layer.side_by_side
    assert layer.norms[2:] == ("attention_out_norm", "out_norm", "mlp_out_norm", "moe_norm", "moe_out_norm")


def test_sizes_of_full_layers():
    wide = {"global_head_dim": 64, "num_global_key_value_heads": 2}
    assert heads(read(**wide)) == [(256, 4), (256, 4), (64, 4)]
    assert heads(read(**wide, attention_k_eq_v=True)) == [(256, 4), (256, 4), (64, 2)]
    # What transformers 5 writes stands for itself; it pads the numbers of layers.
    listed = {"02": {"head_dim": 32}, "00": {"num_key_value_heads": 1}}
    assert heads(read(**wide, per_layer_config=listed)) == [(256, 1), (256, 4), (32, 4)]
    assert heads(read(**wide, per_layer_config=None)) == [(256, 4)] * 3


def test_keys_are_values_in_full_layers_only():
    config = read(attention_k_eq_v=True, layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert [layer.mixer.keys_are_values for layer in config.layers] == [True, False, True]


def test_the_last_layer_sees_all():
    config = read(layer_types=["sliding_attention"] * 3, sliding_window=7)
    assert [layer.mixer.window for layer in config.layers] == [7, 7, None]


def test_one_rope_for_each_type_of_layer():
    ropes = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.5, "factor": 2},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 40.0, "factor": 4.0},
    }
    near, _, far = (layer.mixer.rope for layer in read(rope_parameters=ropes, global_head_dim=16).layers)
    assert near == RopeConfig(256, theta=40.0, kind="linear", factor=4.0)
    assert far == RopeConfig(16, theta=50.0, kind="proportional", factor=2.0, turned_pairs=4)
    odd = {**SMALL, "rope_parameters": {**ropes, "full_attention": {"rope_type": "default", "wavy": 1}}}
    assert unknown_fields(odd) == ["rope_parameters.full_attention.wavy"]


def test_a_wrapper_is_read_by_its_text_config():
    wrapped = {
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "vision_config": {"hidden_size": 7},
        "text_config": {**SMALL, "num_hidden_layers": 3, "use_bidirectional_attention": "vision"},
    }
    assert read_config(wrapped) == read(dtype="bfloat16")
    assert text_config(wrapped)["architectures"] == ["Gemma4ForCausalLM"]
    assert unknown_fields(wrapped) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256 .* models with experts set it to 0"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1 is not supported"),
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention="all" is not supported'),
        ({"enable_moe_block": True}, "moe_intermediate_size=null must be a whole number of at least 1"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "must give layers' numbers head_dim"),
        ({"per_layer_config": {"last": {"head_dim": 16}}}, "must give layers' numbers head_dim"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, "head_dim=0 must be a whole number of at least 1"),
        ({"rope_parameters": {"rope_type": "default"}}, "must hold an object for sliding_attention"),
        ({"rope_parameters": {"sliding_attention": {}}}, "must hold an object for full_attention"),
        ({"sliding_window": None}, "sliding_window=null"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError, match=message):
        read(**fields)


def test_embeddings_for_each_layer_are_refused_where_nothing_is_said():
    with pytest.raises(MoejaxError, match="256 where absent"):
        read_config({"model_type": "gemma4_text"})
