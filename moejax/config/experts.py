"""What a mixture-of-experts block is: its experts, and the steps of its router."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from moejax.config.checks import positive
from moejax.errors import MoejaxError


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """GPT-OSS's `(up + 1) * gate * sigmoid(alpha * gate)`, gate clamped from above and up on both sides at `limit`."""

    alpha: float
    limit: float


ActivationName: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]
Activation: TypeAlias = ActivationName | ClampedSwiGLU
"""What a gated MLP makes of gate and up: `f(gate) * up` with f by its name, or a form of its own."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How router logits become chosen experts and their weights: one row of the table that all families are.

    The steps, in order:
    1. scores = `score`(logits), over all experts, in f32. "none" leaves the logits as they are.
    2. selection scores = scores, plus a learned bias for each expert where `correction` (DeepSeek-V3).
    3. With `groups` > 1, experts stand in that many equal groups. A group's worth is the largest of its selection
       scores, or with `group_score` "top2" the sum of its two largest. Only experts of the best `kept_groups` can be
       chosen: the selection scores of the others become `masked_score`.
    4. The K experts with the largest selection scores are chosen; of exact ties the lower index.
    5. weights = the scores (without the correction) of the chosen, `weigh` "softmax" or "sigmoid" of those K scores.
       An expert outside of the kept groups, should it be chosen for want of others, has score 0.
    6. `renormalise` divides them by their sum, `epsilon` added to it, or by `least_sum` where the sum is smaller.
    7. `scale` multiplies them, and with `expert_scale` a learned factor of the chosen expert (Gemma 4).

    "sparsemixer" replaces all of these (PhiMoE): the two largest logits, each weighed by a softmax over those logits l,
    the larger ones left out, that are no farther below it than 2 `jitter` max(|l|, it).

    `bias` adds a learned bias to the logits (GPT-OSS).
    """

    score: Literal["softmax", "sigmoid", "none", "sparsemixer"] = "softmax"
    bias: bool = False
    correction: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    masked_score: float = 0.0
    weigh: Literal["scores", "softmax", "sigmoid"] = "scores"
    renormalise: bool = True
    epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    expert_scale: bool = False
    jitter: float = 0.01


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """One mixture-of-experts block.

    `shared_intermediate_size` 0 means no shared expert; `shared_gate` multiplies the shared expert's output by a
    sigmoid of a learned projection of its input (Qwen2-MoE). `bias` gives each expert biases on gate, up and down
    (GPT-OSS), `shared_bias` the shared expert (Ernie 4.5). `scales_input` multiplies an expert's input by the routing
    weight, and its output by 1 (Llama 4). `packed` keeps the experts' matrices in memory as MXFP4.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    activation: Activation = "silu"
    router: RouterConfig = field(default_factory=RouterConfig)
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    shared_bias: bool = False
    bias: bool = False
    scales_input: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok"):
            positive(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise MoejaxError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}; "
                "a token cannot choose more experts than there are"
            )
        for name in ("shared_gate", "shared_bias"):
            if getattr(self, name) and not self.shared_intermediate_size:
                raise MoejaxError(f"{name}=True needs a shared expert: set shared_intermediate_size above 0")
        self._check_groups()

    def _check_groups(self) -> None:
        groups, kept = self.router.groups, self.router.kept_groups
        if not 1 <= kept <= groups or self.num_experts % groups:
            raise MoejaxError(
                f"{kept} of {groups} expert groups for num_experts={self.num_experts}: "
                "the groups must divide the experts, and at least one and at most all of them be kept"
            )
        if self.num_experts // groups * kept < self.num_experts_per_tok:
            raise MoejaxError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {kept} kept of {groups} groups hold "
                f"of num_experts={self.num_experts}"
            )
