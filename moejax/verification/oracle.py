"""The oracle: the same checkpoint on one device, a layer at a time, every expert on every token.

It shares no parallel code with the model it judges: no mesh axes, no head layout, no dispatch. It needs the memory of
one layer, so a model larger than one device can be verified too.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moejax.checkpoint.huggingface import load_parameters
from moejax.config import AttentionConfig, DeltaNetConfig, LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from moejax.language_model import role_of
from moejax.loading import abstract_decoder, dtype_of
from moejax.model import finished_logits
from moejax.moe.params import PARAM_NAMES, ExpertParams
from moejax.moe.reference import dense_moe, plain_mlp
from moejax.moe.router import Routing, router_for
from moejax.moe.ties import decision_margin
from moejax.nn.block import added
from moejax.nn.norm import normalise, rms_norm
from moejax.nn.places import Places
from moejax.opening import Checkpoint
from moejax.precision import precision_of
from moejax.verification.attention import attention_reference
from moejax.verification.delta_net import delta_net_reference
from moejax.verification.latent_attention import latent_attention_reference

REFERENCES: dict[type, Callable[..., jax.Array]] = {
    AttentionConfig: attention_reference,
    LatentAttentionConfig: latent_attention_reference,
    DeltaNetConfig: lambda params, config, norm, x, _, segments: delta_net_reference(params, config, norm, x, segments),
}
"""For each kind of mixer: (params, config, norm, x, places, segments) -> y."""

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Reference:
    """What one device computes for a batch of right-padded sequences; host arrays.

    Attributes:
      logits: f32.
      hidden_states: the embeddings, then each layer's output, the last one after the final norm.
      margins: for each sparse layer how narrowly each token's experts were chosen; see `decision_margin`.
      experts: for each sparse layer the chosen experts.
    """

    logits: Float[np.ndarray, "B S V"]
    hidden_states: list[Float[np.ndarray, "B S D"]]
    margins: list[Float[np.ndarray, "B S"]]
    experts: list[Int[np.ndarray, "B S K"]]


class Oracle:
    """Computes references from a checkpoint folder, in a dtype, on this process's first device."""

    def __init__(self, folder: Path, dtype: str):
        """Checks the checkpoint; reads no weights yet."""
        mesh = Mesh(np.array([[jax.local_devices()[0]]]), ("ep", "tp"))
        checkpoint = Checkpoint.open(folder)
        self.folder, self.config, self._files = folder, checkpoint.config, checkpoint.files
        self._plan = checkpoint.plan(mesh)
        self.dtype = dtype_of(dtype, self.config)
        _, abstract = abstract_decoder(self.config, mesh, self.dtype)
        self._abstract = {role_of(path): leaf for path, leaf in abstract.items()}

    def run(self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"]) -> Reference:
        """The reference for right-padded sequences of `lengths` tokens."""
        config = self.config
        segments = jnp.asarray((np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        ends = self._read("embed", "norm.", "lm_head")
        x, states, margins, experts = ends["embed"][jnp.asarray(tokens)], [], [], []
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        for layer, params in zip(config.layers, self.layers(), strict=True):
            states.append(np.asarray(x, np.float32))
            x, routing, margin = _layer(config, layer, params, x, positions, jnp.asarray(lengths, jnp.int32), segments)
            if routing is not None:
                experts.append(np.asarray(routing.experts))
                margins.append(np.asarray(margin))
        x = _norm(config, ends, "norm", x)
        states.append(np.asarray(x, np.float32))
        head = ends["embed" if config.tie_word_embeddings else "lm_head"]
        logits = jnp.einsum("bsd,vd->bsv", x, head, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        logits = finished_logits(logits, ends.get("lm_head_bias"), config)
        return Reference(np.asarray(logits), states, margins, experts)

    def layers(self) -> Iterator[Params]:
        """Each layer's parameters in turn, their names without "layers.N."."""
        for index in range(self.config.num_layers):
            prefix = f"layers.{index}."
            yield {role.removeprefix(prefix): a for role, a in self._read(prefix).items()}

    def experts(self, index: int) -> ExpertParams:
        """The experts of layer `index`."""
        return expert_params(self._read(f"layers.{index}.moe."), f"layers.{index}.moe.")

    def _read(self, *prefixes: str) -> Params:
        wanted = {role: leaf for role, leaf in self._abstract.items() if role.startswith(prefixes)}
        return load_parameters(self._files, self._plan, wanted)


def expert_params(params: Params, prefix: str = "moe.") -> ExpertParams:
    """One layer's experts out of its named parameters."""
    return ExpertParams(**{name: params.get(prefix + name) for name in PARAM_NAMES})  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
    config: ModelConfig,
    layer: LayerConfig,
    params: Params,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    segments: Int[Array, "B S"],
) -> tuple[jax.Array, Routing | None, jax.Array | None]:
    places = Places.of(config, positions, lengths)
    own = {name.removeprefix("attention."): a for name, a in params.items() if name.startswith("attention.")}
    hidden = _norm(config, params, "attention_norm", x)
    y = REFERENCES[type(layer.mixer)](own, layer.mixer, config.norm, hidden, places, segments)
    if layer.branch_norms:
        y = _norm(config, params, "attention_out_norm", y)
    x = added(x, y, config.residual_scale)
    y, routing, margin = _feed_forward(config, layer, params, x)
    if layer.branch_norms:
        y = _norm(config, params, "out_norm", y)
    x = added(x, y, config.residual_scale)
    return x * params["output_scale"] if layer.output_scale else x, routing, margin


def _feed_forward(
    config: ModelConfig, layer: LayerConfig, params: Params, x: jax.Array
) -> tuple[jax.Array, Routing | None, jax.Array | None]:
    hidden = _norm(config, params, "mlp_norm", x)
    if layer.moe is not None and not layer.dense_intermediate_size:
        return _moe(layer.moe, params, hidden, hidden)
    biases = (params.get("mlp.gate_up_bias"), params.get("mlp.down_bias"))
    dense = plain_mlp(hidden, params["mlp.gate_up"], params["mlp.down"], config.activation, *biases)
    if layer.moe is None:
        return dense, None, None
    seen = rms_norm(x, params["router_norm.weight"], config.norm.eps).astype(jnp.float32)
    seen = (seen / config.hidden_size**0.5).astype(x.dtype)
    sparse, routing, margin = _moe(layer.moe, params, _norm(config, params, "moe_norm", x), seen)
    return (
        _norm(config, params, "mlp_out_norm", dense) + _norm(config, params, "moe_out_norm", sparse),
        routing,
        margin,
    )


def _moe(config: MoEConfig, params: Params, hidden: jax.Array, seen: jax.Array) -> tuple[jax.Array, Routing, jax.Array]:
    """The experts on `hidden`, chosen by a router that reads `seen`."""
    logits = jnp.einsum(
        "bsd,de->bse",
        seen,
        params["moe.router"],
        precision=precision_of(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if config.router.bias:
        logits = logits + params["moe.router_bias"].astype(jnp.float32)
    learned = {name: params[f"moe.{name}"] for name in ("correction", "expert_scale") if f"moe.{name}" in params}
    routing = router_for(config)(logits, **learned)
    flat = Routing(*(a.reshape(-1, a.shape[-1]) for a in (routing.weights, routing.experts)))
    tokens = hidden.reshape(-1, hidden.shape[-1])
    y = dense_moe(tokens, expert_params(params), flat, config.activation, config.scales_input)
    return y.reshape(hidden.shape), routing, decision_margin(config, logits, learned.get("correction"))


def _norm(config: ModelConfig, params: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    return normalise(x, config.norm, params[f"{name}.weight"], params.get(f"{name}.bias"))
