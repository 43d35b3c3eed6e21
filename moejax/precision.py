"""How exactly products are computed: float32 means float32 on every platform."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> lax.Precision:
    """HIGHEST for float32, which GPUs and TPUs otherwise round to fewer bits; the platform's own for narrower types.

    Given to each product by name: a context manager would not reach the backward rules, which are traced later.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT
