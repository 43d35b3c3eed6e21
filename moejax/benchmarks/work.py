"""What a model has to do at the least, counted from its config: bytes a decode step reads, FLOPs a prompt costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from moejax.config import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder, dtype_of

_ROUTED = frozenset({"gate_up", "down", "gate_up_bias", "down_bias"})


@dataclass(frozen=True)
class Work:
    """Counts of one model in one dtype.

    Attributes:
      config: the model.
      expert_bytes: of one routed expert, for each sparse layer.
      other_bytes: of everything else that each step reads: all but routed experts and the rows of the embedding. A tied
        embedding is read whole, as the head.
      matrices: values of all matrices of layers outside of the routed experts.
    """

    config: ModelConfig
    expert_bytes: tuple[float, ...]
    other_bytes: int
    matrices: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: str = "auto") -> "Work":
        """Counts a model without making it; `dtype` as `moejax.load` takes it."""
        _, leaves = abstract_decoder(config, AbstractMesh((1, 1), ("ep", "tp")), dtype_of(dtype, config))
        routed: dict[int, int] = {}
        other = matrices = 0
        for path, leaf in leaves.items():
            parts = role_of(path).split(".")
            if "moe" in parts and parts[parts.index("moe") + 1] in _ROUTED:
                routed[int(parts[1])] = routed.get(int(parts[1]), 0) + _bytes(leaf)
            elif parts[0] != "embed" or config.tie_word_embeddings:
                other += _bytes(leaf)
                matrices += math.prod(leaf.shape) if parts[0] == "layers" and len(leaf.shape) > 1 else 0
        per_expert = tuple(routed[index] / _moe(config, index).num_experts for index in config.sparse)
        return cls(config, per_expert, other, matrices)

    def expected_experts(self, batch: int) -> tuple[float, ...]:
        """Distinct experts that `batch` tokens hit in each sparse layer, on average, were routing uniform and
        independent: `E (1 - (1 - K / E)^B)`."""
        layers = (_moe(self.config, index) for index in self.config.sparse)
        return tuple(m.num_experts * (1 - (1 - m.num_experts_per_tok / m.num_experts) ** batch) for m in layers)

    def decode_bytes(self, experts_hit: Sequence[float]) -> float:
        """Bytes of weights that one decode step reads, each once: everything but the experts, and in each sparse layer
        the experts that its tokens hit. The cache and the activations are left out; at short lengths they are little.

        Args:
          experts_hit: distinct experts for each sparse layer.
        """
        return self.other_bytes + sum(n * size for n, size in zip(experts_hit, self.expert_bytes, strict=True))

    def prefill_flops(self, tokens: int) -> float:
        """FLOPs of a prompt of `tokens`: 2 for each value of an active matrix and token, attention's two products over
        the keys that each token sees, and the head for the last token alone. Norms, rope and softmax are left out."""
        active = self.matrices + sum(expert_values(_moe(self.config, index)) for index in self.config.sparse)
        mixing = sum(_mixing_flops(layer, tokens) for layer in self.config.layers)
        return 2 * active * tokens + mixing + 2 * self.config.vocab_size * self.config.hidden_size


def expert_values(moe: MoEConfig) -> int:
    """Values of the routed experts' matrices that one token meets: `3 K D F`."""
    return 3 * moe.num_experts_per_tok * moe.hidden_size * moe.intermediate_size


def _mixing_flops(layer: LayerConfig, tokens: int) -> float:
    """Scores and weighted values: 2 FLOPs a head, value of the head and key seen, for each. A gated DeltaNet reads and
    writes its state `[key_dim, value_dim]` three times a token."""
    mixer = layer.mixer
    if isinstance(mixer, DeltaNetConfig):
        return 6 * mixer.num_value_heads * mixer.key_dim * mixer.value_dim * tokens
    if isinstance(mixer, LatentAttentionConfig):
        return 2 * mixer.num_heads * (mixer.nope_dim + mixer.rope.dim + mixer.value_dim) * _keys_seen(tokens)
    assert isinstance(mixer, AttentionConfig)
    seen = _keys_seen(tokens, mixer.window)
    if mixer.chunk is not None:
        whole, rest = divmod(tokens, mixer.chunk)
        seen = whole * _keys_seen(mixer.chunk) + _keys_seen(rest)
    return 4 * mixer.num_heads * mixer.head_dim * seen


def _keys_seen(tokens: int, window: int | None = None) -> int:
    """Keys that causal attention scores for all tokens together, each seeing itself and at most window - 1 before."""
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach


def _moe(config: ModelConfig, index: int) -> MoEConfig:
    moe = config.layers[index].moe
    assert moe is not None
    return moe


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
