"""What an evaluation says of one file, or of all together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moejax.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Result:
    """Sums over a file. L counts the layers that have experts, E the most experts that one of them has.

    Attributes:
      name: of the file, as short as tells it from the others.
      nats: sum of -log p(target).
      targets: how many there were.
      bytes: UTF-8 bytes of the text that they spell.
      tokens: that were read, those without a target included.
      tokens_per_expert: pairs that the routers chose.
      entropy_sum: over tokens, of the entropy of the softmax over a router's logits, in nats.
      dropped: pairs that found no room; 0 unless a capacity factor was set.
    """

    name: str
    nats: float
    targets: int
    bytes: int
    tokens: int
    tokens_per_expert: Int[np.ndarray, "L E"]
    entropy_sum: Float[np.ndarray, " L"]
    dropped: int

    @property
    def loss(self) -> float:
        """The mean of -log p(target), in nats."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """All nats as bits, those of the ends of documents included, over the bytes of the text."""
        return self.nats / math.log(2) / self.bytes

    @property
    def load(self) -> Float[np.ndarray, "L E"]:
        """The share of a layer's pairs that each expert got."""
        return self.tokens_per_expert / np.maximum(self.tokens_per_expert.sum(1, keepdims=True), 1)

    @property
    def entropy(self) -> Float[np.ndarray, " L"]:
        """The mean over tokens of the entropy of the softmax over a router's logits, in nats."""
        return self.entropy_sum / self.tokens

    def max_over_mean(self, config: ModelConfig) -> list[float]:
        """For each layer with experts, the fullest one's load over the mean."""
        sizes = experts_by_layer(config)
        return [float(load.max() * size) for load, size in zip(self.load, sizes, strict=True)]

    def as_json(self, config: ModelConfig) -> dict[str, Any]:
        """For `--json`; what is not finite is null."""
        sizes = experts_by_layer(config)
        return {
            "name": self.name,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "targets": self.targets,
            "bytes": self.bytes,
            "load": [load[:size].tolist() for load, size in zip(self.load, sizes, strict=True)],
            "load_max_over_mean": self.max_over_mean(config),
            "router_entropy": [_finite(value) for value in self.entropy.tolist()],
            "dropped": self.dropped,
        }


def together(results: Sequence[Result], name: str = "all") -> Result:
    """The sums over several files, so that each target and each byte counts alike."""
    return Result(
        name=name,
        nats=sum(r.nats for r in results),
        targets=sum(r.targets for r in results),
        bytes=sum(r.bytes for r in results),
        tokens=sum(r.tokens for r in results),
        tokens_per_expert=np.sum([r.tokens_per_expert for r in results], axis=0),
        entropy_sum=np.sum([r.entropy_sum for r in results], axis=0),
        dropped=sum(r.dropped for r in results),
    )


def experts_by_layer(config: ModelConfig) -> list[int]:
    """How many experts each layer with experts has."""
    return [layer.moe.num_experts for layer in config.layers if layer.moe is not None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
