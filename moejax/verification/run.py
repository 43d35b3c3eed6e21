"""Verifies a checkpoint on meshes and strategies: generate, run the oracle over what came out, compare."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from moejax.config import ModelConfig, MoEConfig
from moejax.distributed import replicated_to_host
from moejax.inference.generate import Timing, generate
from moejax.language_model import LanguageModel
from moejax.loading import load
from moejax.model import Forward, Lie, lay
from moejax.moe.block import moe
from moejax.moe.params import ExpertParams
from moejax.moe.reference import dense_moe
from moejax.moe.router import Routing
from moejax.verification.compare import F32_TOLERANCE, RECURRENT_TOLERANCE, Observed, Row, judge
from moejax.verification.oracle import Oracle, Reference

NEW_TOKENS = 16
PROMPT_LENGTHS = (1, 7, 12, 24)


class Verifier:
    """Judges models of one checkpoint in one dtype. References are kept: sound meshes generate the same tokens."""

    def __init__(self, folder: Path, dtype: str = "float32"):
        """Opens the checkpoint; see `Oracle`."""
        self.oracle, self.dtype = Oracle(folder, dtype), dtype
        self.prompts = verification_prompts(self.oracle.config)
        self._references: dict[bytes, Reference] = {}

    def rows(self, meshes: Sequence[Mesh], strategies: Sequence[str]) -> Iterator[Row]:
        """One row for each mesh and strategy, as they are done."""
        for mesh in meshes:
            for strategy in strategies:
                yield self.check(load(self.oracle.folder, mesh=mesh, dtype=self.dtype, strategy=strategy))

    def check(self, model: LanguageModel) -> Row:
        """Judges a loaded model, whatever happened to its parameters since."""
        timing = Timing()
        outputs = generate(
            model,
            self.prompts,
            max_new_tokens=NEW_TOKENS,
            temperature=0.0,
            repetition_penalty=1.0,
            stop=[],
            eos_ids=[],
            max_model_len=model.config.steady_length,
            timing=timing,
        )
        sequences = [prompt + output.tokens for prompt, output in zip(self.prompts, outputs, strict=True)]
        tokens, lengths = _rectangle(sequences)
        reference = self._reference(tokens, lengths)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        forward = model(tokens, attention_mask=mask, output_router_logits=True, output_hidden_states=True)
        assert isinstance(forward, Forward)
        observed = _observed(forward, tokens.shape, timing.dropped)
        sparse = list(model.config.sparse)
        return judge(
            ",".join(f"{axis}={size}" for axis, size in model.mesh.shape.items()),
            model.options.strategy,
            reference,
            observed,
            tokens,
            np.array([len(prompt) for prompt in self.prompts]),
            lengths,
            {layer: self._expert_error(model, layer) for layer in sparse},
            sparse,
            narrow=self.oracle.dtype != jnp.float32,
            tolerance=RECURRENT_TOLERANCE if model.config.recurrent else F32_TOLERANCE,
        )

    def _reference(self, tokens: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"]) -> Reference:
        key = tokens.tobytes() + lengths.tobytes()
        if key not in self._references:
            self._references[key] = self.oracle.run(tokens, lengths)
        return self._references[key]

    def _expert_error(self, model: LanguageModel, layer: int) -> float:
        """Error of one layer's experts when every expert is made to work, which no prompt can promise."""
        config = model.config.layers[layer].moe
        assert config is not None
        tokens, k = 2 * config.num_experts, config.num_experts_per_tok
        x = np.random.default_rng(layer).standard_normal((tokens, config.hidden_size))
        x = x.astype(self.oracle.dtype)
        experts = (np.arange(tokens)[:, None] + np.arange(k)) % config.num_experts
        routing = Routing(jnp.full((tokens, k), 1 / k, jnp.float32), jnp.asarray(experts, jnp.int32))
        lie = lay(len(self.prompts), model.mesh, model.options)
        params = model.decoder.layers[layer].moe.expert_params()
        got = replicated_to_host(_experts_on_mesh(lie, config, params, x, routing)).astype(np.float32)
        want = np.asarray(_experts_alone(config, self.oracle.experts(layer), x, routing), np.float32)
        # Over each token's own norm: rounding averages out over the width, a wrong row of one expert does not.
        sizes = np.maximum(np.linalg.norm(want, axis=-1), np.finfo(np.float32).tiny)
        errors = np.linalg.norm(got - want, axis=-1) / sizes
        return float(errors.max()) if np.isfinite(errors).all() else float("inf")


def verification_prompts(config: ModelConfig) -> list[list[int]]:
    """Ragged prompts of random ids that leave room to generate.

    Prompt and continuation stay within the length up to which all rope is steady: past it, a key that was cached
    earlier is turned otherwise than a run over the whole sequence turns it, so that the two have no common answer.
    """
    length = config.steady_length
    room = max(1, length // 2, length - NEW_TOKENS)
    random = np.random.default_rng(0)
    return [random.integers(0, config.vocab_size, min(length, room)).tolist() for length in PROMPT_LENGTHS]


def _rectangle(sequences: list[list[int]]) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
    lengths = np.array([len(sequence) for sequence in sequences])
    tokens = np.zeros((len(sequences), lengths.max()), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, lengths


def _observed(forward: Forward, shape: tuple[int, ...], dropped: int) -> Observed:
    def host(x: jax.Array) -> np.ndarray:
        return np.asarray(replicated_to_host(x))

    return Observed(
        logits=host(forward.logits),
        hidden_states=[host(x).astype(np.float32) for x in forward.hidden_states],
        experts=[host(x).reshape(*shape, -1) for x in forward.routed_experts],
        dropped=dropped + int(host(forward.dropped)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _experts_on_mesh(lie: Lie, config: MoEConfig, params: ExpertParams, x: jax.Array, routing: Routing) -> jax.Array:
    p = lie.parallel
    return moe(
        x,
        params,
        routing,
        batch_axes=p.batch_axes,
        mesh=lie.stream.mesh,
        strategy=p.strategy,
        activation=config.activation,
        scales_input=config.scales_input,
        capacity_factor=p.capacity_factor,
        chunks=p.chunks,
        num_experts=config.num_experts,
    )[0]


@functools.partial(jax.jit, static_argnums=0)
def _experts_alone(config: MoEConfig, params: ExpertParams, x: jax.Array, routing: Routing) -> jax.Array:
    return dense_moe(x, params, routing, config.activation, config.scales_input)
