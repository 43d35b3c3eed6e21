"""What moves information between tokens: attention in its forms, linear attention, and the rope they share."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moejax.config.checks import positive
from moejax.config.experts import ActivationName
from moejax.errors import MoejaxError


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
            positive(name, getattr(self, name))
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
            positive(name, getattr(self, name))
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
            positive(name, getattr(self, name))
        if self.num_value_heads % self.num_key_heads:
            raise MoejaxError(
                f"linear_num_value_heads={self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads={self.num_key_heads}"
            )


Mixer: TypeAlias = AttentionConfig | LatentAttentionConfig | DeltaNetConfig
"""What moves information between the tokens of a layer."""
