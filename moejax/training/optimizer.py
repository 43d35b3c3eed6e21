"""The optimizer of a recipe: AdamW on f32 master weights, the learning rate warmed up and cooled down.

Gradients are clipped by the step, which knows what a mesh holds several times.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from moejax.training.recipe import OptimizerRecipe


def make_optimizer(recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
    """AdamW whose decay is multiplied by the learning rate, as in torch.

    It leaves a router's `correction` as it is: no gradient reaches it, the balance of the experts moves it. Its update
    mixes weak and strong types, so it runs under `jax.numpy_dtype_promotion("standard")`.

    Args:
      recipe: its rates.
      steps: those of the whole schedule.
    """
    return optax.adamw(
        learning_rate(recipe, steps),
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        mask=decayed,
    )


def learning_rate(recipe: OptimizerRecipe, steps: int) -> optax.Schedule:
    """The rate by the number of updates made before: 0, up in a straight line over `warmup` steps, down by a cosine.

    The highest rate is that of step `warmup` + 1; `min_lr_ratio` of it is reached at the last of `steps` and kept.
    """
    down = optax.cosine_decay_schedule(recipe.lr, max(steps - 1 - recipe.warmup, 1), recipe.min_lr_ratio)
    if not recipe.warmup:
        return down
    return optax.join_schedules([optax.linear_schedule(0.0, recipe.lr, recipe.warmup), down], [recipe.warmup])


def learning_rates(recipe: OptimizerRecipe, steps: int) -> Float[np.ndarray, " steps"]:
    """The same of all updates of the schedule, on the host: a device would answer after the step that it runs."""
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(learning_rate(recipe, steps)(jnp.arange(steps)))


def decayed(params: Any) -> Any:
    """Which parameters decay: the matrices of layers, embeddings among them; no norm, bias or factor does."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _is_matrix(path: tuple[Any, ...], value: Any) -> bool:
    name = jax.tree_util.keystr(path)
    return value.ndim > 1 and "norm" not in name and "bias" not in name
