"""config.json of PhiMoE, and of long ropes in any family."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import read_config, unknown_fields

FACTORS = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3, 4]}
PHIMOE = {"model_type": "phimoe", "hidden_size": 128, "num_hidden_layers": 1}


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's configuration class."""
    config = read_config({"model_type": "phimoe"})
    router = RouterConfig(score="sparsemixer", jitter=0.01)
    assert {layer.mixer for layer in config.layers} == {AttentionConfig(32, 8, 128, rope=RopeConfig(128, 1e6))}
    assert [layer.moe for layer in config.layers] == [MoEConfig(4096, 6400, 16, 2, router=router)] * 32
    assert (config.vocab_size, config.max_position_embeddings) == (32064, 131072)
    assert (config.norm, config.head_bias) == (NormConfig(1e-5, "layer"), False)
    assert (config.bos_id, config.eos_ids, config.tie_word_embeddings) == (1, (2,), False)
    assert config.recomputed_after is None


def test_long_rope_has_the_short_factors_and_two_scales():
    scaling = {**FACTORS, "short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": 16}
    config = read_config({**PHIMOE, "rope_scaling": scaling, "original_max_position_embeddings": 64})
    assert config.layers[0].mixer.rope == RopeConfig(
        4,
        theta=1e6,
        kind="longrope",
        factor=8192.0,
        original_length=16,
        short_factors=(1.0, 2.0),
        long_factors=(1.0, 2.0),
        mscales=(1.1, 1.3),
        recomputes=True,
    )
    assert (config.steady_length, config.recomputed_after) == (16, 16)
    assert unknown_fields({**PHIMOE, "rope_scaling": scaling}) == []


def test_equal_scales_need_no_recomputation():
    rope = {**FACTORS, "short_mscale": 1.2, "long_mscale": 1.2}
    config = read_config({**PHIMOE, "rope_scaling": rope, "original_max_position_embeddings": 64})
    assert config.layers[0].mixer.rope.original_length == 131_072
    assert (config.steady_length, config.recomputed_after) == (131_072, None)


def test_long_rope_of_other_families_follows_the_length():
    raw = {**PHIMOE, "model_type": "mixtral", "rope_scaling": FACTORS, "original_max_position_embeddings": 64}
    config = read_config(raw)
    rope = config.layers[0].mixer.rope
    assert (rope.short_factors, rope.long_factors, rope.mscales) == ((1.0, 2.0), (3.0, 4.0), None)
    assert (rope.original_length, rope.factor) == (64, 2048.0)
    assert (config.steady_length, config.recomputed_after) == (64, None)


def test_switches():
    config = read_config({**PHIMOE, "router_jitter_noise": 0.0, "lm_head_bias": True, "sliding_window": 5})
    assert config.layers[0].moe.router.jitter == 0 and config.head_bias and config.layers[0].mixer.window == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported for phimoe"),
        ({"rope_scaling": FACTORS}, "short_mscale is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear, which is not supported for phimoe"),
        ({"rope_scaling": {**FACTORS, "long_factor": [1.0]}}, "long_factor has 1 numbers for 2 rotated pairs"),
        ({"rope_scaling": {**FACTORS, "short_factor": [1.0, "x"]}}, 'short_factor="x" must be a number above 0'),
        ({"rope_scaling": {**FACTORS, "short_factor": None}}, "short_factor=null must be a list of numbers"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(MoejaxError, match=message):
        read_config({**PHIMOE, **fields})
