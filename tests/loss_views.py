"""What router losses see, at random, and the same losses in numpy, token by token in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moejax import MoEConfig, RouterConfig, Routing
from moejax.moe.balance import RouterView
from moejax.moe.router import router_for

# Packed rows: ids may come back in another row, be any, and there may be padding anywhere, also a row of nothing else.
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [7, 7, 7, 7, 7, 7], [0, 1, 0, 0, 2, 3], [0, 0, 0, 0, 0, 0]], np.int32)
SOFTMAX = MoEConfig(8, 8, 5, 2)
SIGMOID = dataclasses.replace(SOFTMAX, router=RouterConfig("sigmoid", correction=True))
LLAMA4 = dataclasses.replace(SOFTMAX, router=RouterConfig("none", weigh="sigmoid", renormalise=False))


def count(experts, width):
    return np.bincount(experts[experts >= 0], minlength=width).astype(np.int32)


def view_of(config, logits, experts, segments=SEGMENTS, earlier=None):
    """The view of a layer that chose `experts`, int [B, S, K], wherever there is a token."""
    experts = np.where(segments[..., None] > 0, experts, -1).astype(np.int32)
    counts = jnp.asarray(count(experts, config.num_experts))
    routing = Routing(jnp.ones(experts.shape), jnp.asarray(experts))
    return RouterView(jnp.asarray(logits, jnp.float32), routing, counts, jnp.asarray(segments), config, earlier)


def random_views(config, layers=2, segments=SEGMENTS, seed=0):
    """Skewed logits, routed as the config says, after earlier steps of other counts."""
    rng, e = np.random.default_rng(seed), config.num_experts
    learned = {"correction": jnp.asarray(rng.standard_normal(e), jnp.float32)} if config.router.correction else {}
    views = []
    for _ in range(layers):
        logits = (2 * rng.standard_normal((*segments.shape, e)) + rng.standard_normal(e)).astype(np.float32)
        experts = np.asarray(router_for(config)(jnp.asarray(logits), **learned).experts)
        views.append(view_of(config, logits, experts, segments, jnp.asarray(rng.integers(0, 9, e), jnp.int32)))
    return views


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def scores(config, x):
    """s'_i of DeepSeek-V3's equation 20, or the softmax."""
    if "sigmoid" not in (config.router.score, config.router.weigh):
        return softmax(x)
    s = 1 / (1 + np.exp(-x))
    return s / s.sum(-1, keepdims=True)


def parts(view, logits):
    """The rows (logits, experts) of each sequence of each row."""
    segments, experts = np.asarray(view.segments), np.asarray(view.routing.experts)
    found = []
    for row in range(len(segments)):
        for start in range(segments.shape[1]):
            first = start == 0 or segments[row, start] != segments[row, start - 1]
            if segments[row, start] == 0 or not first:
                continue
            stop = start
            while stop < segments.shape[1] and segments[row, stop] == segments[row, start]:
                stop += 1
            found.append((logits[row, start:stop], experts[row, start:stop]))
    return found


def everything(view, logits):
    x, experts = zip(*parts(view, logits), strict=True)
    return np.concatenate(x), np.concatenate(experts)


def switch(views, logits):
    """Over all layers' tokens as if they were one layer's, as transformers does."""
    e = views[0].config.num_experts
    x, experts = zip(*(everything(view, of) for view, of in zip(views, logits, strict=True)), strict=True)
    x, experts = np.concatenate(x), np.concatenate(experts)
    f = np.array([(experts == i).any(-1).mean() for i in range(e)])
    return e * (f * softmax(x).mean(0)).sum()


def sequence(views, logits):
    """Equations 17 to 20 for each sequence; the mean over tokens' sequences, and layers."""
    total, tokens = 0.0, 0
    for view, of in zip(views, logits, strict=True):
        e = view.config.num_experts
        for x, experts in parts(view, of):
            t, pairs = len(x), (experts >= 0).sum()
            f = np.array([e / pairs * (experts == i).any(-1).sum() for i in range(e)])
            total += t * (f * scores(view.config, x).mean(0)).sum()
            tokens += t
    return total / tokens


def global_batch(views, logits):
    values = []
    for view, of in zip(views, logits, strict=True):
        x, experts = everything(view, of)
        counts = count(experts, view.config.num_experts) + np.asarray(view.earlier)
        values.append((len(counts) * counts / counts.sum() * scores(view.config, x).mean(0)).sum())
    return np.mean(values)


def z(views, logits):
    per_token = np.concatenate(
        [np.log(np.exp(everything(v, of)[0]).sum(-1)) ** 2 for v, of in zip(views, logits, strict=True)]
    )
    return per_token.mean()


ORACLES = {"switch": switch, "sequence": sequence, "global": global_batch, "z": z}
