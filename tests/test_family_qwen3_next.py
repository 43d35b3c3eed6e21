"""Qwen3-Next and Qwen3.5-MoE: their configs, and the forms in which their tensors are stored."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_families.qwen3_5_moe_text import CONFIGS as QWEN3_5
from tiny_families.qwen3_next import CONFIGS as NEXT

import moejax
from moejax.checkpoint.plan import MeshLayout, plan
from moejax.config import AttentionConfig, DeltaNetConfig, MoEConfig, NormConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import family_of, read_config, text_config, unknown_fields
from moejax.opening import Checkpoint

TYPES = ("qwen3_next", "qwen3_5_moe_text")
FULL = AttentionConfig(16, 2, 256, rope=RopeConfig(64), qk_norm="head", gate=True)
LINEAR = DeltaNetConfig(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, kernel=4)


def read(model_type, **fields):
    return read_config({"model_type": model_type, **fields})


def is_full(config):
    return [isinstance(layer.mixer, AttentionConfig) for layer in config.layers]


def full(config):
    return next(layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig))


def test_absent_fields_take_the_familys_defaults():
    """Literals from transformers 5.23's configuration classes."""
    for config in map(read, TYPES):
        assert {layer.mixer for layer in config.layers} == {FULL, LINEAR}
        assert is_full(config) == [False, False, False, True] * (config.num_layers // 4)
        assert (config.norm, config.max_position_embeddings) == (NormConfig(1e-6, "rms_plus_one"), 32768)
        assert (config.tie_word_embeddings, config.bos_id, config.eos_ids) == (False, None, ())
        assert config.sparse == tuple(range(config.num_layers)) and config.recurrent
    old, new = map(read, TYPES)
    assert (old.vocab_size, old.num_layers, new.vocab_size, new.num_layers) == (151936, 48, 248320, 40)
    shared = {"shared_intermediate_size": 512, "shared_gate": True}
    assert old.layers[0].moe == MoEConfig(2048, 512, num_experts=512, num_experts_per_tok=10, **shared)
    assert new.layers[0].moe == MoEConfig(2048, 512, num_experts=256, num_experts_per_tok=8, **shared)
    assert read("qwen3_next", mlp_only_layers=[3]).layers[3].dense_intermediate_size == 5632


@pytest.mark.parametrize("model_type", TYPES)
def test_layer_types_win_over_the_interval(model_type):
    listed = ["full_attention", "linear_attention", "attention"]
    config = read(model_type, num_hidden_layers=3, layer_types=listed, full_attention_interval=1)
    assert is_full(config) == [True, False, True]
    assert is_full(read(model_type, num_hidden_layers=3, full_attention_interval=1)) == [True] * 3
    assert not read(model_type, num_hidden_layers=3, full_attention_interval=1).recurrent


@pytest.mark.parametrize("model_type", TYPES)
def test_rope_turns_the_part_that_the_rope_object_states_first(model_type):
    assert full(read(model_type, partial_rotary_factor=0.5)).rope == RopeConfig(128)
    inside = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 1.0}
    config = read(model_type, partial_rotary_factor=0.5, rope_parameters=inside)
    assert full(config).rope == RopeConfig(256, 1e7)
    mrope = {"rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    assert full(read(model_type, rope_parameters=mrope)).rope == RopeConfig(64)


def test_qwen3_next_heeds_what_qwen3_5_does_not():
    fields = {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4}
    old, new = (read(model_type, **fields) for model_type in TYPES)
    assert old.sparse == (3,) and old.layers[3].moe.router == RouterConfig(renormalise=False)
    assert new.sparse == (0, 1, 2, 3) and new.layers[3].moe.router == RouterConfig()


@pytest.mark.parametrize("model_type", TYPES)
def test_fields_that_transformers_does_not_read_change_nothing(model_type):
    unread = {"attn_output_gate": False, "use_sliding_window": True, "sliding_window": 8, "mamba_ssm_dtype": "bfloat16"}
    unread |= {"max_window_layers": 1, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True}
    assert read(model_type, **unread) == read(model_type)
    assert unknown_fields({"model_type": model_type, **unread}) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_num_value_heads": 24}, "linear_num_value_heads=24 is not a multiple of linear_num_key_heads=16"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0 must be a whole number of at least 1"),
        ({"hidden_act": "tanh"}, 'hidden_act="tanh" is not supported'),
        ({"full_attention_interval": 0}, "full_attention_interval=0 must be a whole number of at least 1"),
        (
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            r"layer_types\[0\]='sliding_attention' is not supported; full_attention and linear_attention are",
        ),
        ({"partial_rotary_factor": 0.001}, "0 values of a head are to be rotated"),
    ],
)
@pytest.mark.parametrize("model_type", TYPES)
def test_what_cannot_be_is_refused_by_name(model_type, fields, message):
    with pytest.raises(MoejaxError, match=message):
        read(model_type, **fields)


def wrapped(**fields):
    vision = {"model_type": "qwen3_5_moe", "depth": 1}
    return {
        "model_type": "qwen3_5_moe",
        "text_config": QWEN3_5["qwen3_5_moe_text_mrope"],
        "vision_config": vision,
    } | fields


def test_the_wrapper_reads_as_its_text_model():
    raw = wrapped()
    assert read_config(raw) == read_config(raw["text_config"])
    assert (text_config(raw)["model_type"], unknown_fields(raw)) == ("qwen3_5_moe_text", [])


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_embeddings_are_tied_where_either_config_says_so(outer, inner):
    """transformers' wrapper heeds the outer field, its text model the inner; the files settle what they contradict."""
    text = QWEN3_5["qwen3_5_moe_text_mrope"] | {"tie_word_embeddings": inner}
    assert read_config(wrapped(text_config=text, tie_word_embeddings=outer)).tie_word_embeddings == (inner or outer)


def checkpoint(folder, raw, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_tensors(raw):
    config = read_config(raw)
    family, random = family_of(config.model_type), np.random.default_rng(0)
    shapes = plan(config, family.names, family.experts, MeshLayout(1, range)).shapes
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def stacked(tensors, layers, experts):
    """The published form: all experts of a layer in two tensors."""
    out = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in layers:
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([tensors[f"{stem}.{e}.{part}_proj.weight"] for e in range(experts)])
            for part in ("gate", "up", "down")
        )
        out |= {f"{stem}.gate_up_proj": np.concatenate([gate, up], 1), f"{stem}.down_proj": down}
    return out


@pytest.mark.parametrize("raw", [NEXT["qwen3_next_grouped"], QWEN3_5["qwen3_5_moe_text_mrope"]], ids=TYPES)
@pytest.mark.parametrize("mesh", ["ep=4,tp=2", "ep=2,tp=4"])
def test_round_trip_is_exact(tmp_path, raw, mesh):
    tensors = random_tensors(raw)
    model = moejax.load(checkpoint(tmp_path / "in", raw, tensors), mesh=moejax.make_mesh(mesh))
    moejax.save_pretrained(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())


def test_stacked_experts_load_as_separate_ones_and_other_modalities_are_left_out(tmp_path):
    raw = wrapped()
    tensors = random_tensors(raw)
    inside = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in stacked(tensors, range(3), 6).items()
    }
    others = {
        name: np.zeros(1, np.float32) for name in ("model.visual.pos_embed.weight", "mtp.norm.weight", "mtp.fc.weight")
    }
    folder = checkpoint(tmp_path / "in", raw, inside | others)
    model = moejax.load(folder, mesh=moejax.make_mesh("ep=2,tp=2"))
    assert sorted(model.left_out) == ["model.visual (1 tensor)", "mtp (2 tensors)"]
    moejax.save_pretrained(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())


def test_layers_of_multi_token_prediction_are_left_out_by_name(tmp_path):
    raw = NEXT["qwen3_next_grouped"]
    extra = {"mtp.fc.weight": np.zeros(1, np.float32), "mtp.layers.0.mlp.gate.weight": np.zeros(1, np.float32)}
    with Checkpoint.open(checkpoint(tmp_path / "in", raw, random_tensors(raw) | extra)) as opened:
        assert opened.left_out == ("mtp (2 tensors)",)
        opened.plan(moejax.make_mesh("ep=1,tp=1"))
