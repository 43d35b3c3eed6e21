"""The published configs in configs/models: they read without a doubt, and describe models of the published sizes."""

import json
import math
from pathlib import Path

import pytest

from moejax.checkpoint.plan import MeshLayout, plan
from moejax.families import family_of, read_config, unknown_fields

MODELS = Path(__file__).parents[1] / "configs" / "models"

# Billions of parameters of the text model, without layers of multi-token prediction: as the publisher states them, or,
# where that figure is rounded or counts other parts, as transformers' own modules count them.
SIZES = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "olmoe-1b-7b": 6.92,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 235.7,
    "deepseek-v3": 671.0,
    "kimi-k2": 1026.4,  # stated as 1T
    "qwen3-next-80b-a3b": 79.67,  # stated as 80B
    "qwen3.5-35b-a3b": 34.66,  # 35.1 with vision
    "qwen3.5-122b-a10b": 122.11,  # 122.6 with vision
    "qwen3.5-397b-a17b": 396.35,  # 396.8 with vision
    "glm-4.5": 352.8,  # stated as 355B: with multi-token prediction, without embeddings and head
    "glm-4.5-air": 106.85,  # stated as 106B
    "minimax-m2": 228.7,  # stated as 230B
    "gemma-4-26b-a4b": 25.23,  # 25.8 with vision
    "llama-4-scout-17b-16e": 107.77,  # 108.6 with vision, stated as 109B
    "llama-4-maverick-17b-128e": 400.71,  # 401.6 with vision, stated as 400B
    "granite-3.0-1b-a400m": 1.335,  # stated as 1.3B
    "granite-3.0-3b-a800m": 3.3,
    "ernie-4.5-21b-a3b": 21.83,  # stated as 21B
    "ernie-4.5-300b-a47b": 299.48,  # stated as 300B
    "dots.llm1": 142.8,  # stated as 142B
    "hunyuan-a13b": 80.39,  # stated as 80B
    "phi-3.5-moe": 41.87,  # stated as 16 x 3.8B
    # Shapes to measure, of nobody's model: layers, embedding, head and norms added up.
    "olmoe-4l": 0.8879,
    "mixtral-4l": 0.4305,
    # Ours: at most 8.2 million, 16.5 MB in bfloat16.
    "moejax-demo": 0.008142,
    "moejax-smoke": 0.0000735,
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
