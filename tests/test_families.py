"""config.json of each family: what it becomes, and what is refused."""

from typing import Any, cast

import pytest

from moejax.config import AttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import DEFAULT_NAMES, FAMILIES, family_of, read_config, unknown_fields


def mixer(config):
    """The first layer's attention; layers differ in windows alone."""
    return config.layers[0].mixer


def experts(config):
    return next(layer.moe for layer in config.layers if layer.moe)


def dense_widths(config):
    return {layer.dense_intermediate_size for layer in config.layers if not layer.moe}


def windows_of(config):
    return tuple(layer.mixer.window for layer in config.layers)


TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}


def read(model_type, **fields):
    return read_config({"model_type": model_type, **TINY, **fields})


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's configuration classes."""
    mixtral = read_config({"model_type": "mixtral"})
    assert mixer(mixtral) == AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig(128, 1e6))
    assert experts(mixtral) == MoEConfig(4096, 14336, num_experts=8, num_experts_per_tok=2)
    assert (mixtral.vocab_size, mixtral.max_position_embeddings, mixtral.norm) == (32000, 131072, NormConfig(1e-5))
    assert (mixtral.bos_id, mixtral.eos_ids, mixtral.dtype) == (1, (2,), "float32")
    assert windows_of(mixtral) == (None,) * 32 and mixtral.sparse == tuple(range(32))

    qwen2 = read_config({"model_type": "qwen2_moe"})
    assert mixer(qwen2) == AttentionConfig(16, 16, 128, rope=RopeConfig(128), qkv_bias=True)
    assert experts(qwen2) == MoEConfig(
        2048, 1408, 60, 4, router=RouterConfig(renormalise=False), shared_intermediate_size=5632, shared_gate=True
    )
    assert (qwen2.vocab_size, qwen2.max_position_embeddings, qwen2.norm) == (151936, 32768, NormConfig(1e-6))
    assert (qwen2.bos_id, qwen2.eos_ids) == (None, ())
    assert windows_of(qwen2) == (None,) * 24 and qwen2.sparse == tuple(range(24))

    qwen3 = read_config({"model_type": "qwen3_moe"})
    assert mixer(qwen3) == AttentionConfig(32, 4, 64, rope=RopeConfig(64), qk_norm="head")
    assert experts(qwen3) == MoEConfig(2048, 768, 128, 8, router=RouterConfig(renormalise=False))
    assert windows_of(qwen3) == (None,) * 24
    assert dense_widths(read_config({"model_type": "qwen3_moe", "mlp_only_layers": [1]})) == {6144}
    assert dense_widths(read_config({"model_type": "qwen2_moe", "mlp_only_layers": [1]})) == {5632}

    olmoe = read_config({"model_type": "olmoe"})
    assert mixer(olmoe) == AttentionConfig(16, 16, 128, rope=RopeConfig(128), qk_norm="full")
    assert experts(olmoe) == MoEConfig(2048, 2048, 64, 8, router=RouterConfig(renormalise=False))
    assert (olmoe.vocab_size, olmoe.max_position_embeddings, olmoe.norm) == (50304, 4096, NormConfig(1e-5))
    assert (olmoe.bos_id, olmoe.eos_ids) == (None, (50279,))
    assert not any(config.tie_word_embeddings for config in (mixtral, qwen2, qwen3, olmoe))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_both_spellings_mean_the_same(model_type):
    scaling = {"factor": 4.0, "original_max_position_embeddings": 512}
    hub = read(model_type, rope_theta=5e5, rope_scaling={"type": "yarn", **scaling}, torch_dtype="bfloat16")
    five = read(model_type, rope_parameters={"rope_type": "yarn", "rope_theta": 500000, **scaling}, dtype="bfloat16")
    assert hub == five
    assert hub.dtype == "bfloat16"
    assert mixer(hub).rope == RopeConfig(8, theta=5e5, kind="yarn", factor=4.0, original_length=512)


def test_precedence_within_the_rope_fields():
    both = read("olmoe", rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_type": "default"})
    assert mixer(both).rope == RopeConfig(8, kind="linear", factor=2.0)
    inner = read("olmoe", rope_theta=7.0, rope_parameters={"rope_theta": 9.0})
    assert mixer(inner).rope.theta == 9.0
    top = read("olmoe", rope_scaling=None, rope_parameters={"rope_type": "default"}, rope_theta=7.0)
    assert mixer(top).rope == RopeConfig(8, theta=7.0)
    named = read("olmoe", rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 3.0})
    assert mixer(named).rope.kind == "linear"


def test_original_context_of_a_scaling():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert mixer(read("olmoe", rope_scaling=yarn)).rope.original_length == 4096
    inner = {**yarn, "original_max_position_embeddings": 256}
    assert mixer(read("olmoe", rope_scaling=inner)).rope.original_length == 256
    top = read("olmoe", rope_scaling=inner, original_max_position_embeddings=128)
    assert mixer(top).rope.original_length == 128
    assert mixer(read("olmoe", rope_scaling={**inner, "factor": None})).rope.factor == 16.0


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None, None, None)),
        ({"sliding_window": 0, "use_sliding_window": False}, (None, None, None, None)),
        ({"use_sliding_window": True}, (4096, None, 4096, None)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (8, None, None, None)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "attention", "sliding_attention"],
            },
            (None, 8, None, 8),
        ),
    ],
)
def test_qwen2_windows(fields, windows):
    assert windows_of(read("qwen2_moe", **fields)) == windows


def test_windows_of_the_uniform_families():
    assert windows_of(read("mixtral", sliding_window=16)) == (16,) * 4
    assert windows_of(read("mixtral", sliding_window=16, layer_types=["sliding_attention"] * 4)) == (16,) * 4
    assert windows_of(read("qwen3_moe", sliding_window=16)) == (None,) * 4
    assert windows_of(read("qwen3_moe", sliding_window=16, use_sliding_window=True)) == (16,) * 4
    assert windows_of(read("qwen3_moe", sliding_window=None, use_sliding_window=True)) == (None,) * 4


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (False, False, False, True)),
        ({"num_experts": 0}, (False, False, False, False)),
    ],
)
def test_sparse_layers(model_type, fields, sparse):
    assert read(model_type, **fields).sparse == tuple(layer for layer in range(4) if sparse[layer])


@pytest.mark.parametrize(
    ("model_type", "name", "alias"),
    [
        ("mixtral", "num_local_experts", "num_experts"),
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("olmoe", "num_experts", "num_local_experts"),
    ],
)
def test_expert_count_goes_by_two_names(model_type, name, alias):
    assert experts(read(model_type, **{name: 12})).num_experts == 12
    assert experts(read(model_type, **{alias: 12})).num_experts == 12
    assert experts(read(model_type, **{name: 12, alias: 10})).num_experts == 10


def test_attention_switches():
    assert mixer(read("mixtral", head_dim=None)).head_dim == 8
    assert mixer(read("mixtral", head_dim=64)).head_dim == 64
    assert mixer(read("mixtral", num_key_value_heads=None)).num_kv_heads == 4
    assert not mixer(read("qwen2_moe", qkv_bias=False)).qkv_bias
    for model_type in ("qwen3_moe", "olmoe"):
        attention = mixer(read(model_type, attention_bias=True))
        assert attention.qkv_bias and attention.out_bias
    assert mixer(read("olmoe", clip_qkv=8)).clip_qkv == 8.0
    assert not mixer(read("mixtral", attention_bias=True)).qkv_bias


def test_remaining_fields_arrive():
    config = read(
        "qwen3_moe",
        norm_topk_prob=True,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        rms_norm_eps=1,
        bos_token_id=0,
        eos_token_id=[3, 0],
        moe_intermediate_size=24,
        num_experts_per_tok=3,
        torch_dtype="float16",
        dtype="bfloat16",
    )
    assert experts(config).router.renormalise and experts(config).activation == "gelu_tanh"
    assert (experts(config).intermediate_size, experts(config).num_experts_per_tok) == (24, 3)
    assert (config.tie_word_embeddings, config.norm.eps, config.dtype) == (True, 1.0, "bfloat16")
    assert (config.bos_id, config.eos_ids) == (0, (3, 0))
    assert read("mixtral", eos_token_id=None).eos_ids == ()


def yarn(**fields):
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **fields}}


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mixtral", {"per_layer_config": {"0": {}}}, 'per_layer_config={"0": {}} is not supported'),
        ("mixtral", {"attention_chunk_size": 64}, "attention_chunk_size=64 is not supported"),
        ("mixtral", {"is_causal": False}, "is_causal=false is not supported"),
        ("mixtral", {"is_encoder_decoder": True}, "is_encoder_decoder=true is not supported"),
        ("qwen2_moe", {"mlp_bias": True}, "mlp_bias=true is not supported"),
        ("qwen2_moe", {"hidden_act": "quick_gelu"}, 'hidden_act="quick_gelu" is not supported; one of silu, '),
        ("qwen2_moe", {"dtype": "float64"}, 'dtype="float64" is not supported; one of float32, '),
        ("qwen2_moe", {"torch_dtype": 16}, "torch_dtype=16 is not supported"),
        ("mixtral", {"rope_scaling": {"rope_type": "su"}}, "rope_scaling.rope_type='su' is not supported"),
        ("mixtral", {"rope_parameters": {"rope_type": None}}, "rope_parameters.rope_type=None is not supported"),
        ("mixtral", {"rope_scaling": "yarn"}, 'rope_scaling="yarn" must be an object or null'),
        (
            "qwen2_moe",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention is an object: one rope per layer type is not supported",
        ),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("mixtral", yarn(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor=0.5 is not supported"),
        ("mixtral", {"rope_theta": "1e6"}, 'rope_theta="1e6" must be a number above 0'),
        ("mixtral", {"rope_theta": 1}, "rope_theta=1.0 must be above 1"),
        ("mixtral", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            "mixtral",
            {"rope_scaling": {"type": "linear", "factor": -2}},
            "rope_scaling.factor=-2 must be a number above",
        ),
        ("mixtral", yarn(factor=float("nan")), "rope_scaling.factor=NaN must be a number above 0"),
        ("mixtral", yarn(truncate="no"), 'rope_scaling.truncate="no" must be true or false'),
        (
            "mixtral",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 3}},
            "rope_scaling.high_freq_factor=3 must not be below low_freq_factor=4.0",
        ),
        ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "needs head_dim above 2"),
        ("qwen2_moe", {"layer_types": ["full_attention"] * 3}, "names 3 layers but num_hidden_layers=4"),
        (
            "qwen2_moe",
            {"layer_types": ["full_attention", "chunked_attention"] * 2},
            "layer_types[1]='chunked_attention' is not supported",
        ),
        ("qwen2_moe", {"layer_types": "full_attention"}, 'layer_types="full_attention" must be a list of names'),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 4}, "but use_sliding_window is false"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, "sliding_window=null must be a whole"),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 4}, "layer_types contradicts sliding_window=None"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0 must be a whole number of at least 1"),
        ("olmoe", {"sliding_window": 64}, "sliding_window=64 is not supported for olmoe"),
        ("olmoe", {"head_dim": 16}, "num_attention_heads=4 times head_dim=16 must be hidden_size=32"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv=0 must be a number above 0"),
        ("olmoe", {"hidden_size": "32"}, 'hidden_size="32" must be a whole number of at least 1'),
        ("olmoe", {"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number of at least 1"),
        ("olmoe", {"hidden_size": True}, "hidden_size=true must be a whole number of at least 1"),
        ("olmoe", {"num_hidden_layers": None}, "num_hidden_layers=null must be a whole number of at least 1"),
        ("olmoe", {"num_experts": -1}, "num_experts=-1 must be a whole number of at least 1"),
        ("olmoe", {"num_experts": 4}, "num_experts_per_tok=8 is more than num_experts=4"),
        ("olmoe", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ("olmoe", {"rms_norm_eps": None}, "rms_norm_eps=null must be a number above 0"),
        ("olmoe", {"eos_token_id": [1, "2"]}, 'eos_token_id=[1, "2"] must be a list of whole numbers'),
        ("olmoe", {"eos_token_id": [1, -2]}, "eos_token_id=[1, -2] must hold token ids of at least 0"),
        ("olmoe", {"eos_token_id": -1}, "eos_token_id=-1 must be a whole number of at least 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a whole number of at least 1"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list of whole numbers or null"),
        ("qwen3_moe", {"head_dim": 7}, "7 values of a head are to be rotated; rotary embeddings rotate pairs"),
        ("gpt2", {}, "model_type='gpt2' is not supported; supported are mixtral, qwen2_moe, qwen3_moe, olmoe"),
        (None, {}, "the config has no model_type; supported are mixtral"),
        (["mixtral"], {}, "model_type=['mixtral'] is not supported"),
    ],
)
def test_refusals(model_type, fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(model_type, **fields)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_config_must_be_an_object():
    with pytest.raises(MoejaxError, match="must be a JSON object, got list"):
        read_config(cast(Any, [1]))


def test_long_values_are_cut_in_messages():
    with pytest.raises(MoejaxError) as refusal:
        read("mixtral", per_layer_config={"modules": ["x"] * 1000})
    assert len(str(refusal.value)) < 250


def test_harmless_values_of_refused_fields_pass():
    plain = read("mixtral")
    harmless = {"per_layer_config": None, "mlp_bias": False, "is_causal": True, "partial_rotary_factor": 1.0}
    assert read("mixtral", **harmless) == plain


def test_unknown_fields():
    raw = {"model_type": "mixtral", "sliding_window": None, "rope_theta": 1e4, "architectures": [], "temperature": 1}
    assert unknown_fields(raw) == []
    raw |= {"zeta": 1, "attention_bias": False, "rope_scaling": {"type": "linear", "factor": 2, "finetuned": True}}
    assert unknown_fields(raw) == ["attention_bias", "zeta", "rope_scaling.finetuned"]
    assert unknown_fields({"model_type": "olmoe", "attention_bias": False}) == []


def test_tensor_names():
    mixtral, olmoe = family_of("mixtral").names, family_of("olmoe").names
    assert mixtral["layers.{l}.moe.up"].format(l=2, e=7) == "model.layers.2.block_sparse_moe.experts.7.w3.weight"
    assert mixtral["layers.{l}.moe.gate"].format(l=0, e=1) == "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert mixtral["layers.{l}.moe.down"].format(l=0, e=1) == "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert olmoe["layers.{l}.moe.gate"].format(l=0, e=1) == "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert olmoe["layers.{l}.attention.q_norm"].format(l=3) == "model.layers.3.self_attn.q_norm.weight"
    assert all(set(family.names) >= set(DEFAULT_NAMES) for family in FAMILIES.values())
