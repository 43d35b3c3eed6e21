"""What a whole decoder is: its layers, and what they share."""

from dataclasses import dataclass
from typing import Literal

from moejax.config.checks import positive
from moejax.config.experts import Activation, MoEConfig
from moejax.config.mixers import DeltaNetConfig, Mixer, RopeConfig


@dataclass(frozen=True, slots=True)
class NormConfig:
    """Normalisation of the stream, of branches and of heads, in f32.

    "rms" rounds to the input's dtype before it multiplies by the weight, "rms_wide" after; "rms_plus_one" is "rms_wide"
    by 1 + weight (zero-centred weights); "layer" also takes the mean away and adds a bias (LayerNorm).
    """

    eps: float
    kind: Literal["rms", "rms_wide", "rms_plus_one", "layer"] = "rms"


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
            positive("dense_intermediate_size", self.dense_intermediate_size)

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
            positive(name, getattr(self, name))
        positive("num_hidden_layers", len(self.layers))

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
