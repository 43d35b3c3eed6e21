"""DeepSeek-V3's layer over ever more H100s that are not there, 1,024 tokens and on average 8,192 rows on each."""

import functools
import json

import pytest
from program_cases import MODELS

from moejax.families import read_config
from moejax.planning.topologies import h100_mesh
from moejax.planning.weak_scaling import TOKENS, TP, measure

pytest.importorskip("jax_cuda12_plugin", reason="compiles for GPUs with JAX's CUDA plugin")
pytestmark = pytest.mark.deviceless

CONFIG = read_config(json.loads((MODELS / "deepseek-v3" / "config.json").read_text())).layers[-1].moe
PAIRS = TOKENS * CONFIG.num_experts_per_tok
CELLS = PAIRS * 3 // 2
"""Rows of the exchange, P C: half more than come on average."""


@functools.cache
def cost(ep):
    return measure(CONFIG, h100_mesh(f"ep={ep},tp={TP}"))


def test_256_devices_do_and_hold_what_16_do():
    few, many = cost(2), cost(32)
    assert (many.devices, few.devices) == (256, 16)
    for name in ("flops", "most_flops", "ep_bytes", "tp_bytes"):
        assert getattr(many, name) == getattr(few, name), name
    assert many.temporaries <= 1.001 * few.temporaries
    assert many.arguments < few.arguments / 12


def test_the_exchange_costs_its_bytes_and_its_headroom():
    """Against one group of 8 devices, which exchanges nothing and has no cells."""
    alone, many, width = cost(1), cost(32), CONFIG.hidden_size
    assert alone.ep_bytes == 0
    assert many.ep_bytes == 2 * 2 * CELLS * width // TP + 4 * CONFIG.num_experts
    inner = CONFIG.intermediate_size // TP
    assert many.flops == alone.flops == alone.most_flops
    assert many.most_flops - alone.most_flops == 2 * (CELLS - PAIRS) * 3 * width * inner
    assert many.tp_bytes - alone.tp_bytes == 2 * (CELLS - PAIRS) * (width // TP + width)
    assert many.temporaries - alone.temporaries <= 2 * (CELLS - PAIRS) * (2 * width + 3 * inner) + many.ep_bytes
