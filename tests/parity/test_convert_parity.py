"""A run's checkpoint, converted, in transformers. Needs the `parity` extra; run with `-m parity`."""

import json

import numpy as np
import optax
import pytest
from tiny import write_checkpoint
from tiny_configs import CONFIGS

import moejax
from moejax.commands import convert
from moejax.run_checkpoints.checkpoints import Checkpoints
from moejax.training.state import TrainState

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]


def test_transformers_gives_the_trained_model_s_logits(mesh, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    raw = CONFIGS["qwen3_yarn"]
    write_checkpoint(tmp_path / "model", raw)
    model = moejax.load(tmp_path / "model", mesh=mesh("ep=4,tp=2"))
    ids = np.random.default_rng(0).integers(0, raw["vocab_size"], (2, 20))
    got = np.asarray(model(ids))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = TrainState.of(model.parameters(), optax.adamw(1e-3), model.mesh)
        checkpoints.save(1, state, model.config, model.mesh)
    assert convert.main([str(tmp_path), str(tmp_path / "hf"), "--to", "hf"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == raw["model_type"]
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
