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
"""

from dataclasses import dataclass, field
from typing import Literal

from moejax.errors import MoejaxError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How router logits become chosen experts and their weights.

    `renormalise` divides the K chosen probabilities by their sum (`norm_topk_prob` in the checkpoints' configs).
    """

    renormalise: bool = True


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """One mixture-of-experts block.

    `shared_intermediate_size` 0 means no shared expert; `shared_gate` multiplies the shared expert's output by a
    sigmoid of a learned projection of its input (Qwen2-MoE).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    activation: Activation = "silu"
    router: RouterConfig = field(default_factory=RouterConfig)
    shared_intermediate_size: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok"):
            _positive(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise MoejaxError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}; "
                "a token cannot choose more experts than there are"
            )
        if self.shared_gate and not self.shared_intermediate_size:
            raise MoejaxError("shared_gate=True needs a shared expert: set shared_intermediate_size above 0")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the fields after `theta` are those of transformers' `rope_parameters`.

    `original_length` is `original_max_position_embeddings`: the context of pretraining that a scaling stretches.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
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


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Grouped-query attention with everything the supported families switch.

    `qk_norm`: "head" normalises each head's H values (Qwen3-MoE), "full" all N * H at once (OLMoE). `clip_qkv` clamps
    queries, keys and values to +-clip_qkv after the norm.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise MoejaxError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise MoejaxError(f"head_dim={self.head_dim} is odd; rotary embeddings rotate pairs")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder: attention and a mixture of experts (or a dense MLP) in each layer.

    `windows[l]` is layer l's sliding window, or None for full attention: the number of tokens that a token sees, itself
    included (position q sees k where q - window < k <= q, as transformers masks). `sparse[l]` says whether layer l is a
    mixture of experts. `dtype` is the checkpoint's own; `eos_ids` may be empty.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    norm_eps: float
    tie_word_embeddings: bool
    attention: AttentionConfig
    rope: RopeConfig
    moe: MoEConfig
    windows: tuple[int | None, ...]
    sparse: tuple[bool, ...]
    dense_intermediate_size: int
    dtype: str = "float32"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _positive(name, getattr(self, name))
        if not self.windows or len(self.windows) != len(self.sparse):
            raise MoejaxError(
                f"{len(self.windows)} attention windows for {len(self.sparse)} layers; one is needed for each"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise MoejaxError(f"sliding windows must be at least 1 token, got {self.windows}")

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, prompt and continuation together.

        Dynamic scaling grows its base with the sequence, so its configs state the length before stretching.
        """
        if self.rope.kind == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        return self.max_position_embeddings


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise MoejaxError(f"{name}={value} must be at least 1")
