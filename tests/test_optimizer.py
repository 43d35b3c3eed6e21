"""The optimizer of a recipe: its learning rate step by step, what decays, and a first update by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.training.optimizer import decayed, learning_rate, learning_rates, make_optimizer
from moejax.training.recipe import OptimizerRecipe


def rates(steps: int, count: int, **fields) -> list[float]:
    rate = learning_rate(OptimizerRecipe(**fields), steps)
    with jax.numpy_dtype_promotion("standard"):
        return [float(rate(updates)) for updates in range(count)]


def test_rate_climbs_from_zero_then_falls_as_a_cosine_to_the_last_step():
    got = rates(11, 13, lr=2.0, warmup=4, min_lr_ratio=0.25)
    cosine = [0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * part / 6)) for part in range(7)]
    assert learning_rates(OptimizerRecipe(lr=2.0, warmup=4, min_lr_ratio=0.25), 11).tolist() == pytest.approx(got[:11])
    assert got == pytest.approx([0.0, 0.5, 1.0, 1.5, *cosine, 0.5, 0.5], abs=1e-6)


def test_rate_without_warmup_and_of_a_run_that_ends_in_it():
    assert rates(3, 3, lr=1.0, warmup=0, min_lr_ratio=0.0) == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert rates(2, 4, lr=1.0, warmup=4) == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert rates(1, 2, lr=1.0, warmup=0, min_lr_ratio=0.5)[0] == 1.0


def test_matrices_decay_and_nothing_else():
    shapes = {
        "embed": (4, 2),
        "lm_head_bias": (4,),
        "norm.weight": (2,),
        "layers.0.attention.q": (2, 1, 2),
        "layers.0.attention.q_bias": (1, 2),
        "layers.0.attention.q_norm": (1, 2),
        "layers.0.attention.sinks": (1,),
        "layers.0.moe.router": (2, 4),
        "layers.0.moe.gate_up": (4, 2, 2, 3),
        "layers.0.moe.gate_up_bias": (4, 2, 3),
        "layers.0.moe.correction": (4,),
    }
    mask = decayed({role: jnp.zeros(shape) for role, shape in shapes.items()})
    assert {role for role, decays in mask.items() if decays} == {
        "embed",
        "layers.0.attention.q",
        "layers.0.moe.router",
        "layers.0.moe.gate_up",
    }


def test_first_update_is_that_of_adamw():
    recipe = OptimizerRecipe(lr=0.1, warmup=0, weight_decay=0.5, beta1=0.9, beta2=0.99, eps=1e-8)
    optimizer = make_optimizer(recipe, 10)
    params = {"embed": jnp.full((1, 2), 2.0), "norm.weight": jnp.full(2, 2.0), "layers.0.moe.correction": jnp.ones(2)}
    gradients = {
        "embed": jnp.array([[3.0, -4.0]]),
        "norm.weight": jnp.array([0.5, 0.0]),
        "layers.0.moe.correction": jnp.zeros(2),
    }
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # The first step of Adam is the gradient's sign; a matrix also loses lr * decay of itself.
    np.testing.assert_allclose(updates["embed"], [[-0.1 - 0.1, 0.1 - 0.1]], atol=1e-6)
    np.testing.assert_allclose(updates["norm.weight"], [-0.1, 0.0], atol=1e-6)
    assert not updates["layers.0.moe.correction"].any()
