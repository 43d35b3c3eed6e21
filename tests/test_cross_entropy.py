"""The blockwise loss against the plain one, values and gradients, on meshes, with what heads come with."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import compiled, normal, relative
from tiny_configs import CONFIGS

from moejax.families import read_config
from moejax.model import Options, finished_logits, lay
from moejax.training import cross_entropy as module
from moejax.training.cross_entropy import cross_entropy

B, S, D, V = 8, 6, 8, 19
CONFIG = replace(read_config(CONFIGS["qwen3_llama3"]), vocab_size=V)


def plain(x, head, bias, targets, weights, config):
    logits = jnp.einsum("bsd,vd->bsv", x, head, precision="highest")[..., :V]
    logits = finished_logits(logits, None if bias is None else bias[:V], config)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -(chosen * weights).sum()


@pytest.mark.parametrize("head_kind", ["plain", "bias, scale, bound"])
@pytest.mark.parametrize("spec", ["ep=1,tp=1", "ep=4,tp=2", "ep=2,tp=4", "ep=8,tp=1"])
def test_equals_the_plain_loss(spec, head_kind, mesh, monkeypatch):
    """Blocks of 4 tokens, and more rows in the table than words in the vocabulary."""
    monkeypatch.setattr(module, "BLOCK", 4)
    special = head_kind != "plain"
    config = replace(CONFIG, logits_scale=0.7, logits_softcap=2.0) if special else CONFIG
    rng = np.random.default_rng(0)
    x, head = normal(rng, B, S, D), normal(rng, 24, D)
    bias = normal(rng, 24) if special else None
    targets = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
    weights = jnp.asarray(rng.random((B, S)) < 0.7, jnp.float32) / 17
    stream = lay(B, mesh(spec), Options()).stream

    def loss(function, *more):
        arguments = (0, 1) if bias is None else (0, 1, 2)
        run = jax.value_and_grad(lambda x, head, bias: 3 * function(x, head, bias, targets, weights, *more), arguments)
        return compiled(run)(x, head, bias)

    value, gradients = loss(cross_entropy, config, stream)
    want, wanted = loss(plain, config)
    assert relative(value, want) < 1e-6
    for a, b in zip(gradients, wanted, strict=True):
        assert relative(a, b) < 1e-5


def test_targets_of_weight_zero_may_be_anything(mesh):
    rng = np.random.default_rng(0)
    x, head, stream = normal(rng, B, S, D), normal(rng, V, D), lay(B, mesh("ep=1,tp=1"), Options()).stream
    targets = jnp.full((B, S), -1, jnp.int32)
    weights = jnp.zeros((B, S))
    value, dx = compiled(jax.value_and_grad(lambda x: cross_entropy(x, head, None, targets, weights, CONFIG, stream)))(
        x
    )
    assert value == 0 and not np.asarray(dx).any()


def test_the_logits_of_all_tokens_never_exist(mesh):
    config = replace(CONFIG, vocab_size=64)
    stream = lay(8, mesh("ep=1,tp=1"), Options()).stream
    x, head = jnp.ones((8, module.BLOCK, D)), jnp.ones((64, D))
    targets, weights = jnp.zeros((8, module.BLOCK), jnp.int32), jnp.ones((8, module.BLOCK))
    program = compiled(jax.value_and_grad(lambda x: cross_entropy(x, head, None, targets, weights, config, stream)))
    assert f"f32[{8 * module.BLOCK},64]" not in program.lower(x).compile().as_text()
