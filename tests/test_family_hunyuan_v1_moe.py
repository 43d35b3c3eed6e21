"""config.json of Hunyuan-v1-MoE."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig
from moejax.errors import MoejaxError
from moejax.families import read_config


def read(**fields):
    return read_config({"model_type": "hunyuan_v1_moe", "num_hidden_layers": 2, "head_dim": 128, **fields})


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's configuration class."""
    config = read_config({"model_type": "hunyuan_v1_moe"})
    mixer = AttentionConfig(32, 32, 128, rope=RopeConfig(128), qk_norm="head", norm_after_rope=True)
    moe = MoEConfig(4096, 11008, 1, 1, shared_intermediate_size=11008)
    assert {layer.mixer for layer in config.layers} == {mixer}
    assert [layer.moe for layer in config.layers] == [moe] * 32
    assert (config.vocab_size, config.max_position_embeddings, config.norm) == (290943, 2048, NormConfig(1e-5))
    assert (config.bos_id, config.eos_ids, config.tie_word_embeddings) == (1, (2,), False)


def test_experts_of_a_token_by_layer():
    def chosen(**fields):
        return [layer.moe.num_experts_per_tok for layer in read(num_experts=8, **fields).layers]

    assert chosen(moe_topk=3) == [3, 3]
    assert chosen(moe_topk=[3, 1, 9]) == [3, 1]
    assert chosen(moe_topk=[3, 1], num_experts_per_tok=2) == [2, 2]
    assert read(num_experts=8, num_local_experts=4).num_experts == 4
    with pytest.raises(MoejaxError, match="moe_topk has 1 numbers but num_hidden_layers=2"):
        chosen(moe_topk=[3])


def test_alpha_makes_dynamic_scaling_static():
    scaling = {"type": "dynamic", "factor": 2.0}
    rope = read(rope_scaling={**scaling, "alpha": 1000.0}).layers[0].mixer.rope
    assert rope == RopeConfig(128, theta=10_000 * 1000 ** (128 / 126))
    assert read(rope_scaling={**scaling, "alpha": 1000.0}).context == 2048
    assert read(rope_scaling=scaling).layers[0].mixer.rope == RopeConfig(128, kind="dynamic", factor=2.0)
    assert read(rope_scaling=scaling).context == 4096
    linear = read(rope_scaling={"type": "linear", "factor": 2.0, "alpha": 9.0}).layers[0].mixer.rope
    assert linear == RopeConfig(128, kind="linear", factor=2.0)
