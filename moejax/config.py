"""What a model is, as frozen dataclasses that know nothing of files, families or devices.

The letters used for array dimensions everywhere in moejax:

| letter | dimension                     | letter | dimension                             |
|--------|-------------------------------|--------|---------------------------------------|
| B      | batch (sequences)             | E      | experts                               |
| S      | sequence (tokens of one)      | K      | experts chosen for each token (top-k) |
| T      | tokens, B * S                 | C      | capacity (rows of one exchange cell)  |
| D      | model width                   | F      | hidden width of an expert or MLP      |
| N      | attention heads               | P      | devices along the expert axis `ep`    |
| G      | key/value heads               | R      | devices along the tensor axis `tp`    |
| H      | width of one head             | V      | vocabulary                            |
| L      | width of a latent (MLA)       |        |                                       |
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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
            _positive(name, getattr(self, name))
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


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the fields after `theta` are those of transformers' `rope_parameters`.

    `dim` is the rotated width, the first values of a head; the others pass as they are. `interleaved` turns neighbours
    (2i, 2i + 1) instead of (i, i + paired/2). `original_length` is `original_max_position_embeddings`: the context of
    pretraining that a scaling stretches. Of the paired/2 pairs "proportional" turns only the first `turned_pairs`.

    "longrope" divides each pair's frequency by its own factor, of `short_factors` in sequences up to `original_length`
    and of `long_factors` in longer ones. `mscales` (short, long) multiply sine and cosine likewise, in place of
    `attention_factor` (PhiMoE). `recomputes` runs a sequence that grows past `original_length` anew, so that all its
    keys are turned alike; otherwise those in the cache stay as they were turned.
    """

    dim: int
    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"] = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    mscales: tuple[float, float] | None = None
    recomputes: bool = False
    turned_pairs: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1 or (self.kind == "yarn" and self.dim % 2):
            raise MoejaxError(f"{self.dim} values of a head are to be rotated; rotary embeddings rotate pairs")

    @property
    def paired(self) -> int:
        """How many values stand in pairs: part of a head may be an odd `dim`, which transformers fills up to a pair."""
        return self.dim + self.dim % 2

    @property
    def switches(self) -> bool:
        """Whether sequences longer than `original_length` are turned otherwise than shorter ones."""
        return self.short_factors != self.long_factors or len(set(self.mscales or ())) == 2


@dataclass(frozen=True, slots=True)
class NormConfig:
    """Normalisation of the stream, of branches and of heads, in f32.

    "rms" rounds to the input's dtype before it multiplies by the weight, "rms_wide" after; "rms_plus_one" is "rms_wide"
    by 1 + weight (zero-centred weights); "layer" also takes the mean away and adds a bias (LayerNorm).
    """

    eps: float
    kind: Literal["rms", "rms_wide", "rms_plus_one", "layer"] = "rms"


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention with everything the supported families switch, for one layer.

    Attributes:
      window: the number of tokens that a token sees, itself included (position q sees k where q - window < k <= q, as
        transformers masks); None for all.
      chunk: tokens see only their own chunk of this many; None for no chunks.
      rope: None leaves queries and keys unturned.
      scale: of the scores; None is 1 / sqrt(head_dim).
      qk_norm: "head" normalises each head's H values (Qwen3-MoE), "full" all N * H at once (OLMoE), "unit" each head
        without a learned weight (Llama 4).
      norm_after_rope: turn first, normalise then.
      value_norm: divides each value head by its root mean square (Gemma 4).
      keys_are_values: values are the keys before norm and rotation; there is no `v` (Gemma 4).
      clip_qkv: clamps queries, keys and values to +-clip_qkv after the norm.
      sinks: a learned score for each head takes part in the softmax and is dropped (GPT-OSS).
      gate: a sigmoid of a second projection of the input multiplies each head's output (Qwen3-Next).
      temperature: (floor, scale): queries grow by log1p(floor((position + 1) / floor)) * scale + 1 (Llama 4).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    rope: RopeConfig | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full", "unit"] = "none"
    norm_after_rope: bool = False
    value_norm: bool = False
    keys_are_values: bool = False
    clip_qkv: float | None = None
    sinks: bool = False
    gate: bool = False
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise MoejaxError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.rope is not None and self.rope.paired > self.head_dim:
            raise MoejaxError(
                f"{self.rope.dim} values of a head are to be rotated; rotary embeddings rotate pairs, of which "
                f"head_dim={self.head_dim} has {self.head_dim // 2}"
            )
        for name in ("window", "chunk"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise MoejaxError(f"attention {name}={size} must be at least 1 token")


@dataclass(frozen=True, slots=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek): keys and values come from a latent of `kv_rank` values a token.

    Each head has `nope_dim` values that positions leave alone and `rope.dim` turned ones, whose keys all heads share.
    `query_rank` None projects queries directly. `scale` multiplies the scores. `bias` is on the two projections into
    latents and on the output. The latents' norms have an epsilon of their own.
    """

    num_heads: int
    kv_rank: int
    query_rank: int | None
    nope_dim: int
    value_dim: int
    rope: RopeConfig
    scale: float
    latent_norm_eps: float = 1e-6
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "nope_dim", "value_dim"):
            _positive(name, getattr(self, name))
        if self.rope.dim % 2:
            raise MoejaxError(f"{self.rope.dim} values of a head are to be rotated; rotary embeddings rotate pairs")


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """Gated DeltaNet (Qwen3-Next): linear attention with a recurrent state `[key_dim, value_dim]` for each value head.

    Each of the `num_key_heads` query and key heads serves num_value_heads / num_key_heads consecutive value heads;
    queries, keys and values pass a causal convolution over `kernel` tokens first.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    activation: ActivationName = "silu"

    def __post_init__(self) -> None:
        for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "kernel"):
            _positive(name, getattr(self, name))
        if self.num_value_heads % self.num_key_heads:
            raise MoejaxError(
                f"linear_num_value_heads={self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads={self.num_key_heads}"
            )


Mixer: TypeAlias = AttentionConfig | LatentAttentionConfig | DeltaNetConfig
"""What moves information between the tokens of a layer."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer: a mixer, then a mixture of experts or, where `moe` is None, a dense MLP of that width.

    Attributes:
      dense_intermediate_size: with `moe` and above 0, a dense MLP runs beside the experts (Gemma 4). Both read the
        stream, and each has a norm of its own before and after; the router reads the stream through a third norm, over
        sqrt(D).
      dense_bias: the dense MLP has biases on gate, up and down.
      branch_norms: what the mixer, and what the rest, add to the stream passes a norm first.
      output_scale: a learned number multiplies the layer's output.
    """

    mixer: Mixer
    moe: MoEConfig | None = None
    dense_intermediate_size: int = 0
    dense_bias: bool = False
    branch_norms: bool = False
    output_scale: bool = False

    def __post_init__(self) -> None:
        if self.moe is None:
            _positive("dense_intermediate_size", self.dense_intermediate_size)

    @property
    def side_by_side(self) -> bool:
        """Whether a dense MLP runs beside the experts."""
        return self.moe is not None and self.dense_intermediate_size > 0

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of its norms over the model width, without the router's."""
        names = ["attention_norm", "mlp_norm"]
        if self.branch_norms:
            names += ["attention_out_norm", "out_norm"]
        if self.side_by_side:
            names += ["mlp_out_norm", "moe_norm", "moe_out_norm"]
        return tuple(names)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder.

    Attributes:
      norm: of all layers and of the end.
      activation: of dense MLPs.
      embedding_scale: multiplies the embeddings, rounded to their dtype first.
      residual_scale: multiplies what each branch adds to the stream.
      logits_scale: multiplies the logits.
      logits_softcap: c bounds them to c * tanh(logits / c).
      head_bias: the output head has a bias.
      dtype: the checkpoint's own.
      eos_ids: may be empty.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    norm: NormConfig
    tie_word_embeddings: bool
    layers: tuple[LayerConfig, ...]
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    head_bias: bool = False
    dtype: str = "float32"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _positive(name, getattr(self, name))
        _positive("num_hidden_layers", len(self.layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def sparse(self) -> tuple[int, ...]:
        """The layers that are mixtures of experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.moe is not None)

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer, the most that one has; 1 where no layer is sparse."""
        return max((layer.moe.num_experts for layer in self.layers if layer.moe is not None), default=1)

    @property
    def recurrent(self) -> bool:
        """Whether a layer carries a state from token to token, and with it the rounding of all tokens before."""
        return any(isinstance(layer.mixer, DeltaNetConfig) for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of its layers."""
        ropes = (None if isinstance(layer.mixer, DeltaNetConfig) else layer.mixer.rope for layer in self.layers)
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    @property
    def steady_length(self) -> int:
        """Tokens up to which a position is turned alike in sequences of any length."""
        lengths = [rope.original_length for rope in self.ropes if rope.switches]
        return min([self.max_position_embeddings, *lengths])

    @property
    def recomputed_after(self) -> int | None:
        """Tokens past which a growing sequence is run anew, once; None where none is."""
        lengths = [rope.original_length for rope in self.ropes if rope.switches and rope.recomputes]
        return min(lengths, default=None)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, prompt and continuation together.

        Dynamic scaling grows its base with the sequence, so its configs state the length before stretching.
        """
        factors = [rope.factor for rope in self.ropes if rope.kind == "dynamic"]
        return int(self.max_position_embeddings * max(factors, default=1.0))


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise MoejaxError(f"{name}={value} must be at least 1")
