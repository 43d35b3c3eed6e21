"""dots.llm1's config.json: defaults, windows, refusals."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import read_config

TINY = {"model_type": "dots1", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
SIZES = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 2}
SLIDING, FULL = "sliding_attention", "full_attention"


def read(**fields):
    return read_config({**TINY, "num_key_value_heads": 2, **SIZES, **fields})


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's Dots1Config, which has no number of experts."""
    config = read_config({"model_type": "dots1", **SIZES})
    router = RouterConfig(
        score="sigmoid",
        correction=True,
        group_score="top2",
        masked_score=-float("inf"),
        renormalise=False,
        epsilon=1e-20,
    )
    assert {layer.mixer for layer in config.layers} == {
        AttentionConfig(32, 32, 144, rope=RopeConfig(144), qk_norm="head")
    }
    assert {layer.moe for layer in config.layers} == {
        MoEConfig(4608, 1408, 16, 4, router=router, shared_intermediate_size=2816)
    }
    assert (config.num_layers, config.vocab_size, config.max_position_embeddings) == (62, 152_064, 2048)
    assert (config.norm, config.bos_id, config.eos_ids) == (NormConfig(1e-6), None, ())
    assert read(first_k_dense_replace=1).layers[0].dense_intermediate_size == 10_944


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None,) * 4),
        ({"max_window_layers": 2}, (None, None, 4096, 4096)),
        ({"max_window_layers": 0, "sliding_window": 8}, (8,) * 4),
        ({"max_window_layers": 0, "sliding_window": None}, (None,) * 4),
        ({"layer_types": [SLIDING, FULL, FULL, SLIDING], "sliding_window": 8}, (8, None, None, 8)),
        ({"layer_types": [FULL] * 4, "max_window_layers": 0}, (None,) * 4),
        ({"max_window_layers": 2, "use_sliding_window": False}, (None, None, 4096, 4096)),  # nothing reads it
    ],
)
def test_windows(fields, windows):
    assert tuple(layer.mixer.window for layer in read(**fields).layers) == windows


def test_attention_bias_is_on_all_four_projections():
    mixer = read(attention_bias=True).layers[0].mixer
    assert mixer.qkv_bias and mixer.out_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_types": [SLIDING] * 4, "sliding_window": None},
            "sliding_window=null leaves no window for layer_types",
        ),
        ({"n_routed_experts": None}, "n_routed_experts=null must be a whole number of at least 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"n_group": 8, "topk_group": 1}, "num_experts_per_tok=4 is more than the 1 kept of 8 groups hold"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(**fields)
    assert message in str(refusal.value)


def test_the_number_of_experts_must_be_stated():
    with pytest.raises(MoejaxError, match="n_routed_experts"):
        read_config({"model_type": "dots1"})
