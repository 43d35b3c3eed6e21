"""What training asks of routers besides the text: settings, their losses, and the update of a learned correction."""

import difflib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.errors import MoejaxError
from moejax.moe.balance import RouterView, global_balance, mean_over_layers, sequence_balance, switch_balance
from moejax.named_function import check_spelling, named_function

BalanceLoss: TypeAlias = Callable[[Sequence[RouterView]], Float[Array, ""]]
"""What a user's own balance loss is: one f32 number from the views of all sparse layers."""

BALANCE: dict[str, BalanceLoss] = {
    "switch": switch_balance,
    "sequence": sequence_balance,
    "global": global_balance,
}
"""The balance losses that have a name."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """How routers are trained.

    Attributes:
      balance: "none", one of `BALANCE`, or a user's `BalanceLoss` as "package.module:function".
      balance_weight: of the balance loss in the sum of losses.
      z_weight: of the router z-loss; ST-MoE uses 0.001.
      bias_update_rate: of `updated_correction`, which follows each update; DeepSeek-V3 uses 0.001. 0 leaves corrections
        as they are.
      jitter: what a router reads is multiplied by noise within 1 - jitter and 1 + jitter; Switch uses 0.01.
      router: a user's `moejax.Router` as "package.module:function"; None is the config's own.

    Raises:
      MoejaxError: a name that is no balance loss, or a number out of range.
    """

    balance: str = "switch"
    balance_weight: float = 0.01
    z_weight: float = 0.0
    bias_update_rate: float = 0.0
    jitter: float = 0.0
    router: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value < math.inf:
                raise MoejaxError(f"{field.name}={value} must be at least 0")
        if self.jitter >= 1:
            raise MoejaxError(f"jitter={self.jitter} must be below 1 (0.01 is usual)")
        if self.router is not None:
            check_spelling(self.router, "router")
        if ":" in self.balance:
            check_spelling(self.balance, "balance")
        elif self.balance not in (names := ["none", *BALANCE]):
            near = difflib.get_close_matches(self.balance, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else 'a loss of your own is "package.module:function"'
            raise MoejaxError(f"balance={self.balance!r} is none of {', '.join(names)}; {hint}")

    def check(self, config: ModelConfig) -> None:
        """Refuses what a decoder of this config cannot honour.

        Raises:
          MoejaxError: a bias update where no router has a correction.
        """
        corrected = any(layer.moe is not None and layer.moe.router.correction for layer in config.layers)
        if self.bias_update_rate and not corrected:
            raise MoejaxError(
                f"bias_update_rate={self.bias_update_rate}, but no router of this {config.model_type} model has a "
                "correction to update (DeepSeek-V3's have); set it to 0 and balance with a loss"
            )


@functools.cache  # equal settings give the same function, so that steps made of it share compiled programs
def router_losses(settings: LossSettings) -> Callable[[Sequence[RouterView]], dict[str, Float[Array, ""]]]:
    """The function that computes the losses of a batch from the views of its sparse layers.

    Returns:
      `losses(views)`: "balance" and "z", f32, unweighted; 0 where there are no views, "balance" also where there is to
      be none.

    Raises:
      MoejaxError: a user's function that cannot be found; at a call, one that gives anything but one number.
    """
    name = settings.balance
    balance = named_function(name, "balance") if ":" in name else BALANCE.get(name)

    @jax.named_scope("router_losses")
    def losses(views: Sequence[RouterView]) -> dict[str, jax.Array]:
        if not views:
            return {"balance": jnp.float32(0), "z": jnp.float32(0)}
        value = jnp.float32(0) if balance is None else jnp.asarray(balance(views))
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise MoejaxError(
                f"balance={name!r} gave {value.dtype} of shape {list(value.shape)}; a balance loss is one float"
            )
        return {"balance": value.astype(jnp.float32), "z": z_loss(views)}

    return losses


def weighted_sum(losses: dict[str, Float[Array, ""]], settings: LossSettings) -> Float[Array, ""]:
    """What the router losses add to the loss of the text; a loss of weight 0 has no part in it and no gradient."""
    weights = {"balance": settings.balance_weight, "z": settings.z_weight}
    return sum((weight * losses[name] for name, weight in weights.items() if weight), jnp.float32(0))


def z_loss(views: Sequence[RouterView]) -> Float[Array, ""]:
    """The mean of logsumexp(logits)^2 over the tokens, padding left out, and over the sparse layers.

    Source: Zoph et al. 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models", equation 5.
    """
    return mean_over_layers(lambda view: view.mean(jnp.square(jax.nn.logsumexp(view.logits, axis=-1))), views)


def updated_correction(
    correction: Float[Array, "*L E"], tokens_per_expert: Int[Array, "*L E"], rate: float
) -> Float[Array, "*L E"]:
    """A router's correction after an update: `rate` up for experts below their layer's mean load, down above, else
    unchanged.

    No loss trains it: the router gives it no gradient, and weight decay must leave it alone.

    Args:
      correction: f32.
      tokens_per_expert: pairs that chose each expert, over the global batch (all accumulation steps).
      rate: DeepSeek-V3 uses 0.001.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
    """
    load = tokens_per_expert.astype(jnp.float32)
    return correction + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
