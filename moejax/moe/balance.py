"""Losses that ask routers to use all experts, as pure functions on global arrays: no mesh, no axis, no collective here.

What is averaged is the whole batch, however it lies on devices, so values and gradients are the same on every mesh.
Counts of chosen experts are constants; gradients flow through the router's scores alone. Padding (segment 0) counts
nowhere.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig, MoEConfig
from moejax.errors import MoejaxError
from moejax.moe.layer import MoEDetails
from moejax.moe.router import Routing


@struct.dataclass
class RouterView:
    """What a loss sees of one sparse layer; a user's own balance loss gets one for each.

    Attributes:
      logits: of the router, f32.
      routing: the chosen experts (int32, -1 on padding) and their weights (f32).
      tokens_per_expert: pairs that chose each expert, over the whole batch, before any drop.
      segments: int32, 0 is padding; a sequence is a run of equal ids within a row.
      config: of the layer.
      earlier: the same as `tokens_per_expert`, summed over the accumulation steps of this update before this one; None
        is zero.
    """

    logits: Float[Array, "B S E"]
    routing: Routing
    tokens_per_expert: Int[Array, " E"]
    segments: Int[Array, "B S"]
    config: MoEConfig = struct.field(pytree_node=False)
    earlier: Int[Array, " E"] | None = None

    @property
    def mask(self) -> Bool[Array, "B S"]:
        """The tokens that are no padding."""
        return self.segments > 0

    @property
    def tokens(self) -> Float[Array, ""]:
        """How many they are; 1 where there are none, so that it divides."""
        return _divisor(self.mask.sum())

    def mean(self, values: Float[Array, "B S *n"]) -> Float[Array, "*n"]:
        """Over those tokens."""
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (values.ndim - 2))
        return jnp.where(mask, values, 0.0).sum((0, 1)) / self.tokens

    def scores(self) -> Float[Array, "B S E"]:
        """What each token gives each expert, as shares of 1: normalised sigmoids where the router weighs by sigmoids,
        else the softmax."""
        steps = self.config.router
        if "sigmoid" not in (steps.score, steps.weigh):
            return jax.nn.softmax(self.logits, axis=-1)
        scores = jax.nn.sigmoid(self.logits)
        return scores / scores.sum(-1, keepdims=True)


def router_views(
    details: Iterable[MoEDetails | None],
    segments: Int[Array, "B S"],
    config: ModelConfig,
    earlier: Iterable[Int[Array, " E"]] | None = None,
) -> list[RouterView]:
    """A view of each sparse layer.

    Args:
      details: of all layers, as `Decoder.hidden_states` gives them.
      segments: of the same batch.
      config: of the decoder.
      earlier: for each sparse layer, `RouterView.earlier`.
    """
    sparse = [(d, layer.moe) for d, layer in zip(details, config.layers, strict=True) if d is not None]
    before = [None] * len(sparse) if earlier is None else list(earlier)
    return [
        RouterView(d.router_logits, d.routing, d.accounting.tokens_per_expert, segments, moe, counts)
        for (d, moe), counts in zip(sparse, before, strict=True)
        if moe is not None
    ]


def switch_balance(views: Sequence[RouterView]) -> Float[Array, ""]:
    """E sum_i f_i P_i over all layers at once: K where tokens are spread evenly, up to E where all choose the same.

    f_i is the chosen pairs of expert i in all layers over the tokens in all layers, so that the f_i sum to K, and P_i
    the mean of the softmax of the logits, whatever the router makes of them. Layers are pooled: expert i of one layer
    makes up for expert i of another.

    It is the value of transformers' `load_balancing_loss_func` with its mask, where experts are the K of the largest
    logits, as there; with a router that corrects or groups its scores, here the experts count that were truly chosen.

    Source: Fedus et al. 2021, "Switch Transformers", equations 4 to 6, as transformers pools them.

    Raises:
      MoejaxError: layers of different numbers of experts.
    """
    experts = sorted({view.config.num_experts for view in views})
    if len(experts) != 1:
        raise MoejaxError(
            f'balance="switch" pools layers, which here have {experts} experts; choose "sequence" or "global"'
        )
    chosen = mean_over_layers(lambda view: view.tokens_per_expert.astype(jnp.float32) / view.tokens, views)
    shares = mean_over_layers(lambda view: view.mean(jax.nn.softmax(view.logits, axis=-1)), views)
    return experts[0] * (chosen * shares).sum()


def sequence_balance(views: Sequence[RouterView]) -> Float[Array, ""]:
    """sum_i f_i P_i within each sequence: 1 where its tokens are spread evenly, up to E / K.

    In a sequence of T tokens, and so of K T pairs, f_i is E / (K T) times the tokens that chose expert i, and P_i the
    mean of their `RouterView.scores`. The sequences of a packed row are its segments. They are averaged by their
    tokens, so that a short one, which cannot be even, weighs little; with sequences of one length that is the paper's
    mean. Layers are averaged: the paper's weight, which adds them up, is this one over the number of sparse layers.

    Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations 17 to 20.
    """
    return mean_over_layers(_sequence_balance, views)


def global_balance(views: Sequence[RouterView]) -> Float[Array, ""]:
    """sum_i f_i P_i with the frequencies of the global batch: 1 where it is spread evenly, up to E / K.

    P_i is the mean of `RouterView.scores` over this batch, and f_i is E times expert i's part of all pairs of this
    batch, over all devices, and of `RouterView.earlier`. So a batch of one domain may prefer some experts as long as
    others make up for it. As in the paper, accumulation step a sees the counts of steps 1 to a, since those to come
    are not known: its frequencies are the global batch's in the last step, and the gradient is not that of one large
    batch, but is the same on every mesh. Layers are averaged.

    Source: Qiu et al. 2025, "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
    Mixture-of-Expert Models", section 3.
    """
    return mean_over_layers(_global_balance, views)


def _sequence_balance(view: RouterView) -> jax.Array:
    counts = _counts_of_own_sequence(view)
    frequencies = view.config.num_experts * counts / _divisor(counts.sum(-1, keepdims=True))
    return view.mean((frequencies * view.scores()).sum(-1))


def _counts_of_own_sequence(view: RouterView) -> Float[Array, "B S E"]:
    """For each token, the pairs of its sequence that chose each expert."""
    experts, width = view.routing.experts, view.config.num_experts
    starts = view.segments[:, 1:] != view.segments[:, :-1]
    index = jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))  # of the sequence, in its row

    def of_row(index: jax.Array, experts: jax.Array) -> jax.Array:
        column = jnp.where(experts < 0, width, experts)  # past the end, where additions are left out
        counts = jnp.zeros((index.size, width), jnp.float32).at[index[:, None], column].add(1.0, mode="drop")
        return counts[index]

    return jax.vmap(of_row)(index, experts)


def _global_balance(view: RouterView) -> jax.Array:
    counts = view.tokens_per_expert if view.earlier is None else view.tokens_per_expert + view.earlier
    frequencies = view.config.num_experts * counts.astype(jnp.float32) / _divisor(counts.sum())
    return (frequencies * view.mean(view.scores())).sum()


def mean_over_layers(of_layer: Callable[[RouterView], jax.Array], views: Sequence[RouterView]) -> jax.Array:
    """The mean of a function of one layer."""
    return sum(map(of_layer, views), jnp.float32(0)) / len(views)


def _divisor(count: jax.Array) -> jax.Array:
    return jnp.maximum(count.astype(jnp.float32), 1.0)
