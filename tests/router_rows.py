"""Each family's router twice: as a row of moejax's table, and slowly in numpy, one token at a time, as transformers
writes it (`models/<name>/modeling_<name>.py`)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moejax import MoEConfig, RouterConfig

EXPERTS = 12
Slow = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[list[int], np.ndarray]]
"""(logits, correction, expert scale), each float64 `[E]` -> the chosen experts, and their weights."""


@dataclass(frozen=True)
class Row:
    """One family: its K, its router, and the slow version."""

    chosen: int
    router: RouterConfig
    slow: Slow

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(8, 8, EXPERTS, self.chosen, router=self.router)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def best(scores, count):
    """Indices of the largest, the lower index first where they tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def softmax_over_all(count, renormalise, factor=1.0):
    def slow(logits, correction, scale):
        p = softmax(logits)
        chosen = best(p, count)
        weights = p[chosen]
        return chosen, (weights / weights.sum() if renormalise else weights) * factor

    return slow


def softmax_over_chosen(logits, correction, scale):
    chosen = best(logits, 4)
    return chosen, softmax(logits[chosen])


def deepseek_v2_in_groups(logits, correction, scale):
    p = softmax(logits)
    worth = [p[group * 3 : group * 3 + 3].max() for group in range(4)]
    for group in range(4):
        if group not in best(worth, 2):
            p[group * 3 : group * 3 + 3] = 0.0
    chosen = best(p, 4)
    return chosen, p[chosen] * 1.5


def deepseek_v3(groups, kept, renormalise, factor):
    size = EXPERTS // groups

    def slow(logits, correction, scale):
        scores = sigmoid(logits)
        for_choice = scores + correction
        worth = [sum(sorted(for_choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        for group in set(range(groups)) - set(best(worth, kept)):
            for_choice[group * size : (group + 1) * size] = -np.inf
        chosen = best(for_choice, 4)
        weights = scores[chosen]
        return chosen, (weights / (weights.sum() + 1e-20) if renormalise else weights) * factor

    return slow


def minimax_m2(logits, correction, scale):
    scores = sigmoid(logits)
    chosen = best(scores + correction, 4)
    return chosen, scores[chosen] / scores[chosen].sum()


def ernie4_5_moe(logits, correction, scale):
    p = softmax(logits)
    chosen = best(p + correction, 4)
    return chosen, p[chosen] / max(p[chosen].sum(), 0.25)


def llama4(logits, correction, scale):
    chosen = best(logits, 2)
    return chosen, sigmoid(logits[chosen])


def gemma4(logits, correction, scale):
    p = softmax(logits)
    chosen = best(p, 4)
    return chosen, p[chosen] / p[chosen].sum() * scale[chosen]


def phimoe(logits, correction, scale):
    chosen, weights, left = [], [], logits.copy()
    for _ in range(2):
        top = left.max()
        expert = best(left, 1)[0]
        # As a product, since 0 / 0 counts as near there.
        far = top - logits > 2 * 0.01 * np.maximum(np.abs(logits), top)
        weights.append(softmax(np.where(far, -np.inf, left))[expert])
        chosen.append(expert)
        left[expert] = -np.inf
    return chosen, np.array(weights)


V3 = dict(score="sigmoid", correction=True, group_score="top2", masked_score=-np.inf, epsilon=1e-20)
ROWS = {
    "mixtral": Row(2, RouterConfig(), softmax_over_all(2, True)),
    "qwen2_moe": Row(4, RouterConfig(renormalise=False), softmax_over_all(4, False)),
    "qwen3_next": Row(4, RouterConfig(), softmax_over_all(4, True)),
    "hunyuan_v1_moe": Row(4, RouterConfig(), softmax_over_all(4, True)),
    "gpt_oss": Row(4, RouterConfig("none", bias=True, weigh="softmax", renormalise=False), softmax_over_chosen),
    "granitemoe": Row(4, RouterConfig("none", weigh="softmax", renormalise=False), softmax_over_chosen),
    "deepseek_v2": Row(4, RouterConfig(scale=1.5, renormalise=False), softmax_over_all(4, False, 1.5)),
    "deepseek_v2 in groups": Row(
        4, RouterConfig(groups=4, kept_groups=2, scale=1.5, renormalise=False), deepseek_v2_in_groups
    ),
    "deepseek_v3": Row(4, RouterConfig(groups=4, kept_groups=2, scale=2.5, **V3), deepseek_v3(4, 2, True, 2.5)),
    "glm4_moe": Row(4, RouterConfig(**V3), deepseek_v3(1, 1, True, 1.0)),
    "dots1": Row(
        4,
        RouterConfig(groups=2, kept_groups=1, renormalise=False, scale=0.5, **V3 | {"epsilon": 0.0}),
        deepseek_v3(2, 1, False, 0.5),
    ),
    "minimax_m2": Row(4, RouterConfig("sigmoid", correction=True), minimax_m2),
    "ernie4_5_moe": Row(4, RouterConfig(correction=True, least_sum=0.25), ernie4_5_moe),
    "llama4": Row(2, RouterConfig("none", weigh="sigmoid", renormalise=False), llama4),
    "gemma4": Row(4, RouterConfig(expert_scale=True), gemma4),
    "phimoe": Row(2, RouterConfig("sparsemixer"), phimoe),
}
