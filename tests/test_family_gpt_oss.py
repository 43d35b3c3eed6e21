"""GPT-OSS's config.json: what it becomes, and what is refused."""

import pytest

from moejax.config import AttentionConfig, ClampedSwiGLU, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import family_of, read_config

YARN = RopeConfig(64, theta=150_000.0, kind="yarn", factor=32.0, original_length=4096, truncate=False)


def read(**fields):
    return read_config({"model_type": "gpt_oss", "num_hidden_layers": 4, **fields})


def test_absent_fields_take_transformers_defaults():
    config = read_config({"model_type": "gpt_oss"})
    assert config.num_layers == 36
    for index, layer in enumerate(config.layers):
        assert layer.mixer == AttentionConfig(
            64, 8, 64, window=None if index % 2 else 128, rope=YARN, qkv_bias=True, out_bias=True, sinks=True
        )
        assert layer.moe == MoEConfig(
            2880,
            2880,
            128,
            4,
            activation=ClampedSwiGLU(1.702, 7.0),
            router=RouterConfig(score="none", bias=True, weigh="softmax", renormalise=False),
            bias=True,
        )
    assert config.norm == NormConfig(1e-5, "rms_wide")
    assert (config.vocab_size, config.max_position_embeddings, config.eos_ids) == (201_088, 131_072, ())


def test_rope_of_the_config_wins_over_the_familys():
    plain = read(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert plain.ropes == (RopeConfig(64, theta=5000.0),)
    assert read(rope_theta=5000.0).ropes[0].kind == "yarn"


def test_windows():
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert [layer.mixer.window for layer in read(layer_types=kinds, sliding_window=9).layers] == [None, 9, 9, None]
    assert [layer.mixer.window for layer in read().layers] == [128, None, 128, None]


def test_the_alias_of_the_number_of_experts_wins():
    assert read(num_local_experts=8).num_experts == 8
    assert read(num_local_experts=8, num_experts=6).num_experts == 6


def test_a_windowed_layer_needs_a_window():
    with pytest.raises(MoejaxError, match="sliding_window=null must be a whole number"):
        read(sliding_window=None)
    assert read(sliding_window=None, layer_types=["full_attention"] * 4).num_layers == 4


def test_experts_stand_as_the_hub_has_them():
    family = family_of("gpt_oss")
    assert family.experts.stacked and family.experts.inputs_first and family.experts.interleaved
    assert family.names["layers.{l}.moe.down_bias"].format(l=3) == "model.layers.3.mlp.experts.down_proj_bias"
