"""DeepSeek-V2, V3 and Kimi-K2: what their configs become, FP8 checkpoints, layers left out, and the latent cache."""

import json
import math
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tiny_families.deepseek_v3 import CONFIGS

import moejax
from moejax.checkpoint.safetensors import DTYPES, ENCODED
from moejax.config import LatentAttentionConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import family_of, read_config, unknown_fields
from moejax.inference.engine import Engine
from moejax.inference.steps import Draw
from moejax.opening import checkpoint_plan
from moejax.quantization import fp8

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
}
YARN = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
V3_ROUTER = RouterConfig(
    score="sigmoid",
    correction=True,
    groups=8,
    kept_groups=4,
    group_score="top2",
    masked_score=-math.inf,
    epsilon=1e-20,
    scale=2.5,
)


def read(model_type, **fields):
    return read_config({"model_type": model_type, **TINY, **fields})


def mixer(config):
    return config.layers[0].mixer


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's configuration classes."""
    attention = LatentAttentionConfig(128, 512, 1536, 128, 128, RopeConfig(64, interleaved=True), 192**-0.5)
    v3 = read_config({"model_type": "deepseek_v3"})
    assert {layer.mixer for layer in v3.layers} == {attention}
    assert v3.layers[-1].moe == MoEConfig(7168, 2048, 256, 8, router=V3_ROUTER, shared_intermediate_size=2048)
    assert v3.sparse == tuple(range(3, 61)) and v3.layers[0].dense_intermediate_size == 18432
    assert (v3.vocab_size, v3.max_position_embeddings, v3.norm) == (129280, 4096, NormConfig(1e-6))
    assert (v3.bos_id, v3.eos_ids, v3.tie_word_embeddings) == (0, (1,), False)

    v2 = read_config({"model_type": "deepseek_v2", "num_experts_per_tok": 6})
    assert {layer.mixer for layer in v2.layers} == {replace(attention, num_heads=32)}
    router = RouterConfig(renormalise=False)
    assert v2.layers[0].moe == MoEConfig(4096, 1407, 64, 6, router=router, shared_intermediate_size=2814)
    assert v2.sparse == tuple(range(32)) and v2.vocab_size == 102400
    assert (v2.max_position_embeddings, v2.norm, v2.bos_id, v2.eos_ids) == (2048, NormConfig(1e-6), 1, (2,))


def test_attention_fields():
    assert mixer(read("deepseek_v2", q_lora_rank=None)).query_rank is None
    assert mixer(read("deepseek_v3", attention_bias=True)).bias
    assert not mixer(read("deepseek_v3", rope_interleave=False)).rope.interleaved
    assert mixer(read("deepseek_v2", rope_interleave=False)).rope.interleaved
    assert mixer(read("deepseek_v2", head_dim=6)).rope.dim == 64
    assert read("deepseek_v3", head_dim=64, qk_head_dim=192) == read("deepseek_v3")
    assert mixer(read("deepseek_v3", rms_norm_eps=1e-5)).latent_norm_eps == 1e-6
    assert {layer.dense_intermediate_size for layer in read("deepseek_v2", intermediate_size=40).layers} == {0, 40}


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_scores_are_sharpened_where_positions_are_stretched(model_type):
    plain, stretched = 192**-0.5, (0.0707 * math.log(40) + 1) ** 2 * 192**-0.5

    def scale(**rope):
        attention = mixer(read(model_type, rope_scaling=rope))
        assert "yarn" not in rope.values() or attention.rope.mscale_all_dim == rope.get("mscale_all_dim")
        return attention.scale

    assert scale(**YARN) == pytest.approx(stretched, rel=1e-12)
    assert scale(rope_type="linear", factor=40, mscale_all_dim=0.707) == pytest.approx(stretched, rel=1e-12)
    assert scale(**{**YARN, "factor": 0.5}) == plain
    assert scale(type="yarn", factor=40) == plain
    assert scale(type="default", factor=40, mscale_all_dim=0.707) == plain
    # Without mscale_all_dim an explicit null asks for the ratio of the contexts, as elsewhere.
    assert scale(type="yarn", factor=None, original_max_position_embeddings=64) == plain


def test_routers():
    def router(model_type, **fields):
        return read(model_type, **fields).layers[-1].moe.router

    limited = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    v2 = RouterConfig(groups=8, kept_groups=3, renormalise=False, scale=16.0)
    assert router("deepseek_v2", **limited, routed_scaling_factor=16.0, norm_topk_prob=True) == v2
    assert router("deepseek_v2", n_group=8, topk_group=3) == RouterConfig(renormalise=False)
    assert router("deepseek_v3") == V3_ROUTER
    changed = replace(V3_ROUTER, groups=1, kept_groups=1, renormalise=False, scale=1.0)
    fields = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1}
    assert router("deepseek_v3", **fields) == router("kimi_k2", **fields) == changed


def test_expert_counts():
    for model_type, alias in (("deepseek_v2", "num_experts"), ("deepseek_v3", "num_local_experts")):
        assert read(model_type, **{alias: 24}).num_experts == 24  # it wins over n_routed_experts
    assert read("deepseek_v3", num_experts=24).num_experts == 16
    assert read("deepseek_v3", n_shared_experts=3).layers[1].moe.shared_intermediate_size == 3 * 2048
    assert read("deepseek_v3", n_shared_experts=0).layers[1].moe.shared_intermediate_size == 0
    assert read("deepseek_v2", first_k_dense_replace=5).sparse == ()


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=4"),
        ("deepseek_v3", {"head_dim": 32}, "head_dim=32 must be qk_rope_head_dim=64"),
        ("deepseek_v3", {"head_dim": None}, "head_dim=null must be qk_rope_head_dim=64"),
        ("deepseek_v2", {"qk_rope_head_dim": 7}, "7 values of a head are to be rotated"),
        ("deepseek_v2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("deepseek_v3", {"rope_scaling": {**YARN, "factor": None}}, "rope_scaling.factor=null must be a number"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        ("deepseek_v2", {"sliding_window": 8}, "sliding_window=8 is not supported for deepseek_v2"),
        ("deepseek_v3", {"layer_types": ["sliding_attention"] * 3}, "layer_types contradicts sliding_window=None"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method="noaux_tc" is not supported'),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group=null must be a whole number"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok=null must be a whole number"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, 'scoring_func="sigmoid" is not supported; softmax is'),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func="softmax" is not supported; sigmoid is'),
        ("kimi_k2", {"topk_method": "greedy"}, 'topk_method="greedy" is not supported; noaux_tc is'),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; 1 is"),
        ("deepseek_v3", {"n_group": 5}, "4 of 5 expert groups for num_experts=16"),
        ("deepseek_v3", {"mlp_bias": True}, "mlp_bias=true is not supported"),
    ],
)
def test_refusals(model_type, fields, message):
    with pytest.raises(MoejaxError) as refusal:
        read(model_type, **fields)
    assert message in str(refusal.value)


def test_names():
    assert family_of("kimi_k2") is family_of("deepseek_v3")
    for raw in CONFIGS.values():
        assert unknown_fields(raw | {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1}) == []
    assert unknown_fields({"model_type": "deepseek_v2", "rope_interleave": True}) == ["rope_interleave"]


def test_layers_that_predict_further_tokens_are_left_out():
    left_out = family_of("deepseek_v3").left_out
    assert left_out({}) == ("model.layers.61.*",)
    assert left_out({"num_hidden_layers": 5, "num_nextn_predict_layers": 0}) == ()
    assert left_out({"num_hidden_layers": 5, "num_mtp_layers": 2}) == ("model.layers.5.*", "model.layers.6.*")
    assert family_of("deepseek_v2").left_out({"num_nextn_predict_layers": 1}) == ()


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
LATENT = 8 + 6  # kv_lora_rank and qk_rope_head_dim


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """A tiny Kimi-K2 as it would be published, and a DeepSeek-V3 of the same values in float32."""
    raw = CONFIGS["deepseek_v3_kimi"] | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "torch_dtype": "bfloat16"}
    tensors, quantised = {}, {}
    rng = np.random.default_rng(0)
    for name, shape in checkpoint_plan(read_config(raw), moejax.make_mesh("ep=1,tp=1")).shapes.items():
        values = (rng.standard_normal(shape) / shape[-1] ** 0.5 + ("norm" in name)).astype(ml_dtypes.bfloat16)
        if "proj" in name:
            q, scales = fp8.quantise(values, (16, 8))
            quantised |= {name: q, f"{name}_scale_inv": scales}
            tensors[name] = q.astype(np.float32) * scales.repeat(16, 0).repeat(8, 1)[: shape[0], : shape[1]]
        else:
            quantised[name] = values.astype(np.float32) if "correction" in name else values
            tensors[name] = values.astype(np.float32)
    further = {f"model.layers.2.{name}": np.zeros(2, np.float32) for name in ("embed_tokens.weight", "eh_proj.weight")}
    plain, packed = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("fp8")
    write(plain, raw, tensors)
    published = {"model_type": "kimi_k2", "num_nextn_predict_layers": 1, "quantization_config": FP8}
    own_code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    write(packed, raw | published | {"auto_map": own_code}, quantised | further)
    return plain, packed


def write(folder, raw, tensors):
    spelled = {dtype: name for name, dtype in (DTYPES | ENCODED).items()}
    header, data = {}, b""
    for name, value in tensors.items():
        start, data = len(data), data + value.tobytes()
        header[name] = {"dtype": spelled[value.dtype], "shape": value.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(raw))


def test_an_fp8_checkpoint_is_the_unquantised_one(kimi, tmp_path):
    """Parameters are equal bit by bit; what is saved is a bfloat16 DeepSeek-V3 that needs no code of its own."""
    plain, packed = kimi
    model = moejax.load(packed, mesh=moejax.make_mesh("ep=2,tp=2"))
    assert model.left_out == ("model.layers.2 (2 tensors)",)
    want = moejax.load(plain, mesh=model.mesh).parameters()
    got = model.parameters()
    assert set(got) == set(want) and got["layers.1.moe.correction"].dtype == np.float32
    for role, value in want.items():
        assert got[role].dtype == value.dtype and np.array_equal(got[role], value), role

    moejax.save_pretrained(model, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    assert raw["torch_dtype"] == "bfloat16" and "quantization_config" not in raw and "auto_map" not in raw
    again = moejax.load(tmp_path / "out", mesh=model.mesh).parameters()
    assert all(np.array_equal(again[role], value) for role, value in want.items())


def test_caches_hold_one_latent_a_token_and_layer(kimi):
    """Rows are cut over ep; a device's part is the latents of its rows, whatever its heads."""
    model = moejax.load(kimi[0], mesh=moejax.make_mesh("ep=2,tp=2"))
    engine = Engine(model, 2, Draw(None, 1.0, False), 0)
    engine.start(np.ones((2, 5), np.int32), np.array([5, 3], np.int32), 0, 30)
    for _ in range(2):
        assert len(engine._step.caches) == 2
        for cache in engine._step.caches:
            (kept,) = vars(cache).values()
            assert kept.nbytes == 2 * model.config.context * LATENT * 2
            assert {shard.data.nbytes for shard in kept.addressable_shards} == {kept.nbytes // 2}
        engine.step(np.ones(2, np.int32))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:::torch|transformers")
def test_an_fp8_checkpoint_equals_transformers_and_so_does_its_export(kimi, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    plain, packed = kimi
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) * 4
    model = moejax.load(packed, mesh=moejax.make_mesh("ep=4,tp=2"), dtype="float32")
    got = np.asarray(model(tokens))
    moejax.save_pretrained(model, tmp_path / "out")
    for folder in (plain, tmp_path / "out"):
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
