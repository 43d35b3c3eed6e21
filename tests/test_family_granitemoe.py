"""config.json of Granite-MoE, with and without a shared expert."""

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import read_config

BOTH = pytest.mark.parametrize("model_type", ["granitemoe", "granitemoeshared"])


@BOTH
def test_absent_fields_take_the_familys_defaults(model_type):
    """Literals from transformers 5.23's configuration classes."""
    config = read_config({"model_type": model_type})
    router = RouterConfig(score="none", weigh="softmax", renormalise=False)
    assert {layer.mixer for layer in config.layers} == {AttentionConfig(32, 32, 128, rope=RopeConfig(128), scale=1.0)}
    assert [layer.moe for layer in config.layers] == [MoEConfig(4096, 11008, 8, 2, router=router)] * 32
    assert (config.vocab_size, config.max_position_embeddings, config.norm) == (32000, 2048, NormConfig(1e-6))
    assert (config.bos_id, config.eos_ids, config.tie_word_embeddings) == (1, (2,), False)
    assert (config.embedding_scale, config.residual_scale, config.logits_scale) == (1, 1, 1)


@BOTH
def test_multipliers(model_type):
    config = read_config(
        {
            "model_type": model_type,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        }
    )
    assert config.layers[0].mixer.scale == 0.015625
    assert (config.embedding_scale, config.residual_scale, config.logits_scale) == (12, 0.22, 1 / 6)


def test_only_one_of_them_has_a_shared_expert():
    plain, shared = (
        read_config({"model_type": model_type, "shared_intermediate_size": 64})
        for model_type in ("granitemoe", "granitemoeshared")
    )
    assert plain.layers[0].moe.shared_intermediate_size == 0
    assert shared.layers[0].moe.shared_intermediate_size == 64


@BOTH
def test_refused(model_type):
    with pytest.raises(MoejaxError, match=f"sliding_window=64 is not supported for {model_type}"):
        read_config({"model_type": model_type, "sliding_window": 64})
    with pytest.raises(MoejaxError, match="logits_scaling=null must be a number above 0"):
        read_config({"model_type": model_type, "logits_scaling": None})
