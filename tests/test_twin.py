"""Twins of the published configs: small, and with every kind of layer; their weights load and leave nothing neutral."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moejax
from moejax.config import AttentionConfig, ClampedSwiGLU, LayerConfig, MoEConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.families import family_of, read_config, text_config, unknown_fields
from moejax.opening import Checkpoint, checkpoint_plan
from moejax.twins.kinds import layer_kinds
from moejax.twins.shrink import shrink
from moejax.twins.sizes import small_sizes, small_vocabulary
from moejax.twins.weights import tensor_values
from moejax.twins.writing import write_checkpoint

MODELS = Path(__file__).parents[1] / "configs" / "models"
ONE = moejax.make_mesh("ep=1,tp=1")


def published(name: str) -> dict:
    return json.loads((MODELS / name / "config.json").read_text())


def supported(name: str) -> bool:
    try:
        family_of(published(name).get("model_type"))
    except MoejaxError:
        return False
    return True


NAMES = [name for name in sorted(folder.name for folder in MODELS.iterdir()) if supported(name)]


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def twin(name) -> dict:
    return shrink(published(name))


def test_every_kind_of_layer_and_every_switch_of_the_model_is_kept(name, twin):
    before, after = read_config(published(name)), read_config(twin)
    assert set(layer_kinds(after)) == set(layer_kinds(before))
    sizes = ("layers", "vocab_size", "hidden_size", "max_position_embeddings", "embedding_scale", "bos_id", "eos_ids")
    assert replace(after, **{size: getattr(before, size) for size in sizes}) == before
    assert len(after.eos_ids) == len(before.eos_ids)
    assert set(twin) - set(published(name)) <= {"max_position_embeddings", "vocab_size", "floor_scale"}


def test_it_is_tiny_and_consistent(name, twin):
    config = read_config(twin)
    shapes = checkpoint_plan(config, ONE).shapes
    assert 4 * sum(map(math.prod, shapes.values())) < 2e6
    assert unknown_fields(twin) == []
    assert all(token < config.vocab_size for token in (config.bos_id or 0, *config.eos_ids))
    assert shrink(twin) == twin


def test_what_is_written_is_a_whole_checkpoint(name, twin, tmp_path):
    written = write_checkpoint(tmp_path / "twin", twin, dtype="bfloat16")
    wrapped = text_config(twin) is not twin
    with Checkpoint.open(written.folder) as checkpoint:
        layout = checkpoint.plan(ONE)
        assert written.parameters == sum(math.prod(shape) for shape in layout.shapes.values())
        assert checkpoint.config.dtype == "bfloat16"
        assert [part.split(" ")[0] for part in checkpoint.left_out] == ["vision_tower"] * wrapped
        quantised = {info.dtype for info in checkpoint.files.tensors.values()} != {"BF16"}
    assert written.bytes == 2 * written.parameters or twin.get("quantization_config") is not None
    assert quantised <= (twin.get("quantization_config") is not None)


def test_kinds_tell_switches_apart_and_not_sizes():
    moe = MoEConfig(32, 16, 8, 2, router=RouterConfig(groups=4, kept_groups=2))
    layer = LayerConfig(AttentionConfig(8, 2, 16, window=4, rope=RopeConfig(16)), moe)

    def kinds(*layers: LayerConfig):
        return layer_kinds(replace(read_config(published("mixtral-8x7b")), layers=layers))

    def kind(layer: LayerConfig):
        return kinds(layer)[0]

    def attention(**changes):
        return replace(layer, mixer=replace(layer.mixer, **changes))

    def router(**changes):
        return replace(layer, moe=replace(moe, router=replace(moe.router, **changes)))

    same = [
        attention(window=400),
        attention(num_heads=4, head_dim=32, rope=RopeConfig(32)),
        attention(rope=RopeConfig(16, theta=5.0)),
        router(groups=2, kept_groups=2),
        replace(layer, moe=replace(moe, num_experts=64, intermediate_size=5)),
    ]
    assert [kind(other) == kind(layer) for other in same] == [True] * len(same)
    other = [
        attention(window=None),
        attention(num_heads=2),
        attention(rope=RopeConfig(8)),
        attention(rope=RopeConfig(16, kind="linear")),
        attention(sinks=True),
        router(groups=1, kept_groups=1),
        router(scale=2.5),
        replace(layer, moe=replace(moe, shared_intermediate_size=8)),
        LayerConfig(layer.mixer, None, 64),
    ]
    assert len({kind(one) for one in [layer, *other]}) == 1 + len(other)
    assert len(set(kinds(layer, attention(rope=RopeConfig(16, theta=5.0))))) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120}, (10, 2, 80)),
        (
            {"num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512},
            (4, 4, 64),
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48}, (6, 1, 48)),
    ],
)
def test_heads_keep_their_ratio_and_divide_the_width(config, expected):
    small = small_sizes(config)
    assert (small["num_attention_heads"], small["num_key_value_heads"], small["hidden_size"]) == expected


def test_ropes_keep_their_proportions():
    small = small_sizes(
        {
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                "partial_rotary_factor": 0.25,
                "original_max_position_embeddings": 4096,
                "mrope_section": [11, 11, 10],
                "long_factor": list(range(32)),
            },
        }
    )
    assert small["head_dim"] == 32
    assert small["max_position_embeddings"] == 1024
    assert small["rope_parameters"] == {
        "partial_rotary_factor": 0.25,
        "original_max_position_embeddings": 32,
        "mrope_section": [2, 1, 1],
        "long_factor": [0, 8, 16, 24],
    }


def test_groups_divide_the_experts_and_hold_those_chosen():
    small = small_sizes({"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6})
    assert small == {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def test_layers_are_the_first_that_show_every_kind():
    raw = published("qwen1.5-moe-a2.7b") | {"mlp_only_layers": [0, 23], "use_sliding_window": True}
    small = shrink(raw)
    # A dense layer with a window, sparse ones with and without.
    assert (small["num_hidden_layers"], small["max_window_layers"], small["mlp_only_layers"]) == (24, 21, [0, 23])
    raw["mlp_only_layers"] = [1]
    small = shrink(raw | {"layer_types": ["full_attention", "sliding_attention"] * 12})
    assert small["layer_types"] == ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert small["mlp_only_layers"] == [1]


def test_special_tokens_move_in_order_to_the_end_of_the_vocabulary():
    config = {
        "eos_token_id": [900, 2],
        "bos_token_id": 500,
        "pad_token_id": None,
        "image_token_index": 901,
        "top_k": 900,
    }
    moved = {"eos_token_id": [98, 2], "bos_token_id": 97, "pad_token_id": None, "image_token_index": 99, "top_k": 900}
    assert small_vocabulary(config, 100) == moved


def test_weights_are_spread_by_what_they_are():
    config = read_config(shrink(published("mixtral-8x7b")))
    config = replace(config, embedding_scale=12.0, logits_scale=0.25, residual_scale=0.5)
    values = tensor_values(config, checkpoint_plan(config, ONE), 0)
    spread = {name: (array.mean(), array.std()) for name, array in values.items()}
    D = config.hidden_size
    assert spread["model.embed_tokens.weight"][1] == pytest.approx(1 / 12, rel=0.05)
    assert spread["lm_head.weight"][1] == pytest.approx(8 / math.sqrt(D), rel=0.05)
    assert spread["model.norm.weight"] == pytest.approx((1, 0.3), abs=0.1)
    assert spread["model.layers.0.block_sparse_moe.gate.weight"][1] == pytest.approx(1 / math.sqrt(D), rel=0.1)
    assert spread["model.layers.0.self_attn.q_proj.weight"][1] == pytest.approx(2 / math.sqrt(D), rel=0.05)
    assert spread["model.layers.0.self_attn.o_proj.weight"][1] == pytest.approx(3 / math.sqrt(D), rel=0.05)


def test_weights_depend_on_the_seed_and_the_name_alone():
    config = read_config(shrink(published("qwen3-30b-a3b")))
    plan = checkpoint_plan(config, ONE)
    one, same, other = (tensor_values(config, plan, seed) for seed in (0, 0, 1))
    longer = replace(config, layers=config.layers * 2)
    more = tensor_values(longer, checkpoint_plan(longer, ONE), 0)
    for name, value in one.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(same[name], value)
        np.testing.assert_array_equal(more[name], value)
        assert (other[name] != value).all()


def test_a_limit_of_the_activation_is_met():
    config = read_config(shrink(published("mixtral-8x7b")))
    clamped = replace(config.layers[0].moe, activation=ClampedSwiGLU(1.702, 7.0))
    config = replace(config, layers=tuple(replace(layer, moe=clamped) for layer in config.layers))
    values = tensor_values(config, checkpoint_plan(config, ONE), 0)
    assert values["model.layers.0.block_sparse_moe.experts.0.w1.weight"].std() == pytest.approx(
        3.5 / math.sqrt(config.hidden_size), rel=0.05
    )


def test_a_folder_that_holds_something_and_a_large_model_are_refused(tmp_path):
    twin = shrink(published("mixtral-8x7b"))
    (tmp_path / "file").touch()
    with pytest.raises(MoejaxError, match="exists already; save into a new or empty folder"):
        write_checkpoint(tmp_path, twin)
    with pytest.raises(MoejaxError, match=r"would have 136,512 parameters, over 1,000; state the sizes"):
        write_checkpoint(tmp_path / "new", twin, limit=1000)
    assert not (tmp_path / "new").exists()
