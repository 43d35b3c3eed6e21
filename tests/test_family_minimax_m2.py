"""MiniMax-M2's config.json: defaults, how much of a head turns, refusals."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import FAMILIES, read_config

TINY = {"model_type": "minimax_m2", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def read(**fields):
    return read_config({**TINY, "num_key_value_heads": 2, "head_dim": 16, **fields})


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's MiniMaxM2Config."""
    config = read_config({"model_type": "minimax_m2"})
    assert {layer.mixer for layer in config.layers} == {
        AttentionConfig(48, 8, 128, rope=RopeConfig(128, 5e6), qk_norm="full")
    }
    assert {layer.moe for layer in config.layers} == {
        MoEConfig(3072, 1536, 256, 8, router=RouterConfig(score="sigmoid", correction=True))
    }
    assert (config.num_layers, config.vocab_size, config.max_position_embeddings) == (62, 200_064, 196_608)
    assert (config.norm, config.bos_id, config.eos_ids) == (NormConfig(1e-6), 200_034, (200_020,))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "turned"),
    [
        ({}, 16),
        ({"rotary_dim": None}, 16),
        ({"rotary_dim": 8}, 8),
        ({"rotary_dim": 8, "partial_rotary_factor": 0.25}, 4),
        ({"rotary_dim": 8, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}, 12),
        ({"rotary_dim": 8, "rope_parameters": {"rope_theta": 1e4}}, 8),
    ],
)
def test_how_much_of_a_head_turns(fields, turned):
    assert [rope.dim for rope in read(**fields).ropes] == [turned]


def test_the_alias_of_the_experts_wins():
    moe = read(num_local_experts=9, num_experts=12).layers[0].moe
    assert moe is not None and moe.num_experts == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scoring_func": "softmax"}, 'scoring_func="softmax" is not supported for minimax_m2; sigmoid is'),
        ({"sliding_window": 8}, "sliding_window=8 is not supported for minimax_m2; set it to null"),
        ({"head_dim": None}, "head_dim=null must be a whole number of at least 1"),
        ({"rotary_dim": 18}, "18 values of a head are to be rotated; rotary embeddings rotate pairs, of which"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(**fields)
    assert message in str(refusal.value)


def test_layers_that_predict_further_tokens_are_left_out():
    left_out = FAMILIES["minimax_m2"].left_out({"num_hidden_layers": 62, "num_mtp_modules": 3})
    assert left_out == ("model.layers.62.*", "model.layers.63.*", "model.layers.64.*")
