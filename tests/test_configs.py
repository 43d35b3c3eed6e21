"""The published configs in configs/models: they read without a doubt, and describe models of the published sizes."""

import json
import math
from pathlib import Path

import pytest

from moejax.checkpoint.plan import MeshLayout, plan
from moejax.families import family_of, read_config, unknown_fields

MODELS = Path(__file__).parents[1] / "configs" / "models"

# Billions of parameters, as their publishers state them.
SIZES = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "olmoe-1b-7b": 6.92,
}


def test_every_config_has_its_size_here():
    assert {folder.name for folder in MODELS.iterdir()} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_as_many_as_published(name):
    raw = json.loads((MODELS / name / "config.json").read_text())
    config = read_config(raw)
    family = family_of(config.model_type)
    shapes = plan(config, family.names, family.experts, MeshLayout(1, range)).shapes
    total = sum(math.prod(shape) for shape in shapes.values()) / 1e9
    assert unknown_fields(raw) == []
    assert total == pytest.approx(SIZES[name], rel=2e-3)
