"""The oracle: the same checkpoint on one device, a layer at a time, every expert on every token.

It shares no parallel code with the model it judges: no mesh axes, no head layout, no dispatch. It needs the memory of
one layer, so a model larger than one device can be verified too.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.checkpoint.huggingface import check, load_parameters, settle_tied_head
from moejax.checkpoint.safetensors import CheckpointFiles
from moejax.checkpoint.source import read_json
from moejax.config import ModelConfig
from moejax.families import family_of, read_config
from moejax.language_model import role_of
from moejax.loading import abstract_decoder, checkpoint_plan, dtype_of
from moejax.moe.experts import gated_mlp
from moejax.moe.params import ExpertParams
from moejax.moe.reference import dense_moe
from moejax.moe.router import Routing, router_for
from moejax.nn.attend import attend_causal
from moejax.nn.norm import rms_norm
from moejax.nn.rope import apply_rope, rope_tables
from moejax.precision import precision_of

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Reference:
    """What one device computes for a batch of right-padded sequences; host arrays.

    Attributes:
      logits: f32.
      hidden_states: the embeddings, then each layer's output, the last one after the final norm.
      scores: for each sparse layer the selection scores (f32 probabilities) of each token.
      experts: for each sparse layer the chosen experts.
    """

    logits: Float[np.ndarray, "B S V"]
    hidden_states: list[Float[np.ndarray, "B S D"]]
    scores: list[Float[np.ndarray, "B S E"]]
    experts: list[Int[np.ndarray, "B S K"]]


class Oracle:
    """Computes references from a checkpoint folder, in a dtype, on this process's first device."""

    def __init__(self, folder: Path, dtype: str):
        """Checks the checkpoint; reads no weights yet."""
        config = read_config(read_json(folder, "config.json"))
        mesh = Mesh(np.array([[jax.local_devices()[0]]]), ("ep", "tp"))
        family = family_of(config.model_type)
        self.folder = folder
        self.config, self._files = settle_tied_head(config, family.names, CheckpointFiles.open(folder))
        self._plan = checkpoint_plan(self.config, mesh)
        check(self._plan, self._files, family.ignored_tensors)
        self.dtype = dtype_of(dtype, self.config)
        _, abstract = abstract_decoder(self.config, mesh, self.dtype)
        self._abstract = {role_of(path): leaf for path, leaf in abstract.items()}

    def run(self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"]) -> Reference:
        """The reference for right-padded sequences of `lengths` tokens."""
        config = self.config
        segments = jnp.asarray((np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        head_dim, longest = config.attention.head_dim, config.max_position_embeddings
        rope = rope_tables(config.rope, head_dim, longest, positions, jnp.asarray(lengths, jnp.int32))
        ends = self._read("embed", "norm", *(() if config.tie_word_embeddings else ("lm_head",)))
        x, states, scores, experts = ends["embed"][jnp.asarray(tokens)], [], [], []
        for index, params in enumerate(self.layers()):
            states.append(np.asarray(x, np.float32))
            static = (config, config.windows[index], config.sparse[index])
            x, routing, probabilities = _layer(*static, params, x, rope, segments)
            if routing is not None:
                experts.append(np.asarray(routing.experts))
                scores.append(np.asarray(probabilities))
        x = rms_norm(x, ends["norm"], config.norm_eps)
        states.append(np.asarray(x, np.float32))
        head = ends["embed" if config.tie_word_embeddings else "lm_head"]
        logits = jnp.einsum("bsd,vd->bsv", x, head, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        return Reference(np.asarray(logits), states, scores, experts)

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
    names = ("gate_up", "down", "shared_gate_up", "shared_down", "shared_gate")
    return ExpertParams(**{name: params.get(prefix + name) for name in names})  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    config: ModelConfig,
    window: int | None,
    sparse: bool,
    params: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments: jax.Array,
) -> tuple[jax.Array, Routing | None, jax.Array | None]:
    x = x + _attention(config, window, params, rms_norm(x, params["attention_norm"], config.norm_eps), rope, segments)
    hidden = rms_norm(x, params["mlp_norm"], config.norm_eps)
    activation = config.moe.activation
    if not sparse:
        return x + gated_mlp(hidden, params["mlp.gate_up"], params["mlp.down"], activation), None, None
    logits = jnp.einsum(
        "bsd,de->bse",
        hidden,
        params["moe.router"],
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )
    routing = router_for(config.moe)(logits)
    flat = Routing(*(a.reshape(-1, a.shape[-1]) for a in (routing.weights, routing.experts)))
    y = dense_moe(hidden.reshape(-1, hidden.shape[-1]), expert_params(params), flat, activation)
    return x + y.reshape(x.shape), routing, jax.nn.softmax(logits, -1)


def _attention(
    config: ModelConfig,
    window: int | None,
    params: Params,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments: jax.Array,
) -> jax.Array:
    attention = config.attention
    heads = {}
    for name in ("q", "k", "v"):
        y = jnp.einsum("bsd,dnh->bsnh", x, params[f"attention.{name}"], precision=precision_of(x.dtype))
        heads[name] = y + params[f"attention.{name}_bias"] if attention.qkv_bias else y
    for name in ("q", "k") if attention.qk_norm != "none" else ():
        y, weight = heads[name], params[f"attention.{name}_norm"]
        rows = y.reshape(*y.shape[:2], -1) if attention.qk_norm == "full" else y
        heads[name] = rms_norm(rows, weight.reshape(rows.shape[-1]), config.norm_eps).reshape(y.shape)
    if (limit := attention.clip_qkv) is not None:
        heads = {name: jnp.clip(y, -limit, limit) for name, y in heads.items()}
    q, k = apply_rope(heads["q"], *rope), apply_rope(heads["k"], *rope)
    out = attend_causal(q, k.swapaxes(1, 2), heads["v"].swapaxes(1, 2), segments, window)
    y = jnp.einsum("bsnh,nhd->bsd", out, params["attention.o"], precision=precision_of(x.dtype))
    return y + params["attention.o_bias"] if attention.out_bias else y
