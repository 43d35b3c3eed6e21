"""Ernie 4.5's config.json: defaults, which layers are sparse, biases, refusals."""

from fnmatch import fnmatchcase

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import FAMILIES, read_config

TINY = {"model_type": "ernie4_5_moe", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}


def read(**fields):
    return read_config({**TINY, **fields})


def experts(config):
    return next(layer.moe for layer in config.layers if layer.moe)


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's Ernie4_5_MoeConfig."""
    config = read_config({"model_type": "ernie4_5_moe"})
    dense, *sparse = config.layers
    assert dense.mixer == AttentionConfig(20, 4, 128, rope=RopeConfig(128, 5e5, interleaved=True))
    assert dense.moe is None and dense.dense_intermediate_size == 12_288 and not dense.dense_bias
    router = RouterConfig(correction=True, least_sum=1e-12)
    assert {layer.moe for layer in sparse} == {
        MoEConfig(2560, 1536, 64, 6, router=router, shared_intermediate_size=3072)
    }
    assert (config.num_layers, config.vocab_size, config.max_position_embeddings) == (28, 103_424, 131_072)
    assert (config.norm, config.bos_id, config.eos_ids) == (NormConfig(1e-5), 1, (2,))
    assert config.tie_word_embeddings and not config.head_bias


@pytest.mark.parametrize(
    ("start", "end", "interval", "sparse"),
    [
        (1, -1, 1, (1, 2, 3, 4, 5)),
        (0, 3, 1, (0, 1, 2, 3)),
        (1, 4, 2, (1, 3)),
        (0, 9, 3, (2, 5)),
        (4, 2, 1, ()),
    ],
)
def test_which_layers_are_sparse(start, end, interval, sparse):
    config = read(moe_layer_start_index=start, moe_layer_end_index=end, moe_layer_interval=interval)
    assert config.sparse == sparse


def test_biases_are_everywhere_but_in_the_routed_experts():
    config = read(use_bias=True)
    assert config.head_bias
    assert [layer.dense_bias for layer in config.layers] == [True] + [False] * 5
    assert all(layer.mixer.qkv_bias and layer.mixer.out_bias for layer in config.layers)
    assert experts(config).shared_bias and not experts(config).bias
    assert not experts(read(use_bias=True, moe_num_shared_experts=0)).shared_bias


def test_aliases_win():
    moe = experts(read(moe_num_experts=9, num_experts=12, moe_k=2, num_experts_per_tok=3))
    assert (moe.num_experts, moe.num_experts_per_tok) == (12, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bias": None}, "use_bias=null must be true or false"),
        ({"sliding_window": 8}, "sliding_window=8 is not supported for ernie4_5_moe; set it to null"),
        ({"moe_layer_interval": 0}, "moe_layer_interval=0 must be a whole number of at least 1"),
        ({"moe_layer_end_index": [1, 2]}, "moe_layer_end_index=[1, 2] must be a whole number of at least -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(**fields)
    assert message in str(refusal.value)


def test_what_predicts_further_tokens_is_left_out():
    (pattern,) = FAMILIES["ernie4_5_moe"].left_out({})
    assert fnmatchcase("model.mtp_block.0.mlp.gate_proj.weight", pattern)
    assert fnmatchcase("model.mtp_linear_proj.0.weight", pattern)
    assert not fnmatchcase("model.layers.0.mlp.gate_proj.weight", pattern)
