"""An MXFP4 checkpoint from file to logits: experts packed in device memory against the same ones unpacked."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_families import CONFIGS

import moejax
from moejax.twins.writing import write_checkpoint

RAW = {**CONFIGS["gpt_oss_clamped"], "eos_token_id": None, "quantization_config": {"quant_method": "mxfp4"}}
TOKENS = np.random.RandomState(0).randint(0, 101, (2, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss") / "model"
    write_checkpoint(folder, RAW, seed=3)
    return folder


@pytest.fixture(scope="module")
def unpacked(folder) -> np.ndarray:
    model = moejax.load(folder, mesh=moejax.make_mesh("ep=1,tp=1"), dtype="float32", packed=False)
    assert not any(array.dtype == np.uint8 for array in model.parameters().values())
    return np.asarray(model(TOKENS))


# 6 experts fill 8 slots; 96 hidden columns are 3 blocks, of which tp=2 holds 2 each and tp=4 one each, the rest zeros.
@pytest.mark.parametrize(("spec", "strategy"), [("ep=4,tp=2", "all_to_all"), ("ep=2,tp=4", "all_reduce")])
def test_packed_experts_give_the_logits_of_unpacked_ones(folder, unpacked, spec, strategy):
    mesh = moejax.make_mesh(spec)
    model = moejax.load(folder, mesh=mesh, dtype="float32", strategy=strategy)
    logits = np.asarray(model(TOKENS))
    assert np.abs(logits - unpacked).max() <= 1e-5 * np.abs(unpacked).max()
    blocks, scales = (model.parameters()[f"layers.0.moe.gate_up.{kind}"] for kind in ("blocks", "scales"))
    wide = 128
    ep, tp = mesh.shape.values()
    assert blocks.dtype == scales.dtype == np.uint8
    assert blocks.shape == (ep * -(-6 // ep), 2, wide, 2, 16) and scales.shape == blocks.shape[:-1]
    assert blocks.addressable_shards[0].data.shape == (-(-6 // ep), 2, wide // tp, 2, 16)
    down = model.parameters()["layers.0.moe.down.blocks"]
    assert down.addressable_shards[0].data.shape == (-(-6 // ep), 64, wide // 32 // tp, 16)


def test_what_is_saved_of_packed_experts_is_what_was_read(folder, tmp_path):
    model = moejax.load(folder, mesh=moejax.make_mesh("ep=4,tp=2"))
    assert {array.dtype.name for array in jax.tree.leaves(model.parameters())} == {"float32", "uint8"}
    moejax.save_pretrained(model, tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "mxfp4"
    }


def test_what_is_saved_of_unpacked_experts_is_not_quantised(folder, tmp_path, unpacked):
    model = moejax.load(folder, mesh=moejax.make_mesh("ep=1,tp=1"), dtype="float32", packed=False)
    moejax.save_pretrained(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = moejax.load(tmp_path / "saved", mesh=moejax.make_mesh("ep=1,tp=1"), dtype="float32")
    assert np.array_equal(np.asarray(again(TOKENS)), unpacked)
