"""GLM-4.5's config.json: defaults, switches, refusals, and what is left out of its checkpoints."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import FAMILIES, read_config

ROUTER = RouterConfig(score="sigmoid", correction=True, group_score="top2", masked_score=-float("inf"), epsilon=1e-20)
TINY = {"model_type": "glm4_moe", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def read(**fields):
    return read_config({**TINY, "num_key_value_heads": 2, **fields})


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's Glm4MoeConfig."""
    config = read_config({"model_type": "glm4_moe"})
    dense, *sparse = config.layers
    assert dense.mixer == AttentionConfig(96, 8, 42, rope=RopeConfig(21))
    assert dense.moe is None and dense.dense_intermediate_size == 10_944
    assert {layer.moe for layer in sparse} == {
        MoEConfig(4096, 1408, 128, 8, router=ROUTER, shared_intermediate_size=1408)
    }
    assert (config.num_layers, config.vocab_size, config.max_position_embeddings) == (46, 151_552, 131_072)
    assert (config.norm, config.bos_id, config.eos_ids) == (NormConfig(1e-5), None, ())
    assert not config.tie_word_embeddings


def test_switches():
    config = read(
        use_qk_norm=True,
        attention_bias=True,
        partial_rotary_factor=0.25,
        first_k_dense_replace=0,
        n_routed_experts=3,
        num_local_experts=12,  # of two names of one thing, the alias wins
        num_experts_per_tok=4,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
    )
    mixer, moe = config.layers[0].mixer, config.layers[0].moe
    assert mixer == AttentionConfig(4, 2, 8, rope=RopeConfig(2), qkv_bias=True, qk_norm="head")
    assert moe is not None and (moe.num_experts, moe.shared_intermediate_size) == (12, 2 * 1408)
    assert (moe.router.groups, moe.router.kept_groups) == (4, 2)
    assert (moe.router.renormalise, moe.router.scale) == (False, 2.5)


def test_partial_rotation_in_the_rope_object_wins():
    config = read(partial_rotary_factor=0.25, rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 1.0})
    assert config.ropes == (RopeConfig(8, 1e6),)


def test_dense_layers_come_first():
    assert read(first_k_dense_replace=1).sparse == (1,)
    assert read(first_k_dense_replace=5, n_routed_experts=0).sparse == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 8}, "sliding_window=8 is not supported for glm4_moe; set it to null"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types contradicts sliding_window=None"),
        ({"n_group": None}, "n_group=null must be a whole number"),
        ({"n_group": 3}, "1 of 3 expert groups for num_experts=128"),
        ({"n_group": 64, "topk_group": 2}, "num_experts_per_tok=8 is more than the 2 kept of 64 groups"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor=0 must be a number above 0"),
        ({"partial_rotary_factor": 2.0}, "16 values of a head are to be rotated"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(**fields)
    assert message in str(refusal.value)


def test_layers_that_predict_further_tokens_are_left_out():
    left_out = FAMILIES["glm4_moe"].left_out
    assert left_out({}) == ("model.layers.46.*",)
    assert left_out({"num_hidden_layers": 2, "num_mtp_layers": 2}) == ("model.layers.2.*", "model.layers.3.*")
    assert left_out({"num_hidden_layers": 92, "num_nextn_predict_layers": 1}) == ("model.layers.92.*",)
