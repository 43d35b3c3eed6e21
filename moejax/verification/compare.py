"""Judges a model on a mesh against the oracle, as the numerics contract says.

Two computations may choose differently only where the oracle itself is undecided: at a *tie*, a token where its k-th
and (k+1)-th selection scores, or its two best logits, are closer than TIE of the largest. A sequence is compared up to
its first tie.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.verification.oracle import Reference

TIE = 1e-5
F32_TOLERANCE = 1e-5
"""max|a - b| / max|b| over a batch's logits, in float32."""
RECURRENT_TOLERANCE = 1e-4
"""The same for models with recurrent layers."""
NARROW_KL = 5e-2
"""Largest mean KL divergence, in nats a token, that a 16-bit dtype may show.

Rounding turns close routing choices, after which a token's logits have little to do with the oracle's: sound bfloat16
measured 6e-5 on the demo, but up to 4e-2 on random models that choose one expert. One negated head of the demo's 32
gives 7e-2, one negated expert 2e-1. A single row is below any such bound; NARROW_EXPERTS finds those of experts.
"""
NARROW_EXPERTS = 1.5e-2
"""Largest error of the experts under forced routing, over a token's own norm, that a 16-bit dtype may show.

Nothing can choose differently there. Sound bfloat16 measured 3e-3 to 7e-3, one negated row of 256 in one expert 3e-2.
"""


@dataclass(frozen=True)
class Observed:
    """What the model under test computed for the reference's sequences; host arrays, padding included."""

    logits: Float[np.ndarray, "B S V"]
    hidden_states: list[Float[np.ndarray, "B S D"]]
    experts: list[Int[np.ndarray, "B S K"]]
    dropped: int


@dataclass(frozen=True)
class Row:
    """The verdict on one mesh and strategy.

    Attributes:
      mesh, strategy: what ran.
      max_rel_err: largest error of the logits over their largest magnitude.
      greedy_match: the generated tokens are the oracle's best, up to each sequence's first tie.
      dropped: pairs dropped, in all calls.
      ties: sequences that end in a tie before their last token.
      min_margin: the smallest gap between the oracle's choice and the next best, relative, over all compared tokens.
      first_bad_layer: the first layer whose output or experts are wrong, "embedding", "head", or None.
      argmax_agreement, kl: share of tokens with the same best id, and mean KL divergence in nats; 16-bit dtypes only.
      ok: within the contract.
    """

    mesh: str
    strategy: str
    max_rel_err: float
    greedy_match: bool
    dropped: int
    ties: int
    min_margin: float | None
    first_bad_layer: int | str | None
    ok: bool
    argmax_agreement: float | None = None
    kl: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as the command prints it: 16-bit figures only where measured; null where one is not finite."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return {k: v for k, v in finite.items() if k not in ("argmax_agreement", "kl") or getattr(self, k) is not None}


def judge(
    name: str,
    strategy: str,
    reference: Reference,
    observed: Observed,
    tokens: Int[np.ndarray, "B S"],
    prompts: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    expert_errors: dict[int, float],
    sparse: list[int],
    narrow: bool,
    tolerance: float = F32_TOLERANCE,
) -> Row:
    """One row.

    Args:
      name, strategy: for the row.
      reference, observed: the same sequences by the oracle and by the model.
      tokens: the sequences: prompts and what the model generated after them, right-padded.
      prompts, lengths: tokens of each prompt, and of each whole sequence.
      expert_errors: for each sparse layer the error of its experts under forced routing, over each token's norm.
      sparse: the sparse layers' indices.
      narrow: a 16-bit dtype, judged by agreement and divergence.
      tolerance: of logits and hidden states in float32; that of the experts alone is F32_TOLERANCE always.
    """
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    routing, greedy = routing_margins(reference), logit_margins(reference)
    generated = real & (np.arange(tokens.shape[1]) >= (prompts - 1)[:, None])
    generated &= np.arange(tokens.shape[1]) < (lengths - 1)[:, None]
    tied = real & (routing < TIE) | generated & (greedy < TIE)
    before_tie = real & (np.cumsum(tied, axis=1) == 0)
    match = _greedy_match(reference, tokens, before_tie & generated)
    error = relative_error(observed.logits, reference.logits, before_tie)
    margins = np.minimum(np.where(generated, greedy, np.inf), routing)[before_tie]
    common = {
        "mesh": name,
        "strategy": strategy,
        "max_rel_err": error,
        "greedy_match": match,
        "dropped": observed.dropped,
        "ties": int(tied.any(axis=1).sum()),
        "min_margin": float(margins.min()) if margins.size and np.isfinite(margins.min()) else None,
    }
    if narrow:
        agreement, kl = _agreement(reference, observed, real)
        worst = max(expert_errors.values(), default=0.0)
        ok = kl <= NARROW_KL and worst <= NARROW_EXPERTS and observed.dropped == 0
        bad = next((layer for layer, e in expert_errors.items() if e > NARROW_EXPERTS), None)
        return Row(**common, first_bad_layer=bad, ok=bool(ok), argmax_agreement=agreement, kl=kl)
    bad = _first_bad_layer(reference, observed, before_tie, expert_errors, sparse, tolerance)
    if bad is None and not error <= tolerance:
        bad = "head"
    ok = bad is None and match and observed.dropped == 0
    return Row(**common, first_bad_layer=bad, ok=bool(ok))


def relative_error(a: np.ndarray, b: np.ndarray, where: Bool[np.ndarray, "B S"]) -> float:
    """max|a - b| / max|b| over the tokens of `where`; infinite where `a` is not finite."""
    if not where.any():
        return 0.0
    a, b = a[where].astype(np.float64), b[where].astype(np.float64)
    error = np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny)
    return float(error) if np.isfinite(error) else float("inf")


def routing_margins(reference: Reference) -> Float[np.ndarray, "B S"]:
    """For each token how narrowly the narrowest of its layers chose experts."""
    margins = np.full(reference.logits.shape[:2], np.inf)
    return np.minimum.reduce([margins, *reference.margins])


def logit_margins(reference: Reference) -> Float[np.ndarray, "B S"]:
    """For each token the gap between its two best logits, over the largest magnitude."""
    best = -np.partition(-reference.logits, 1, axis=-1)[..., :2]
    return (best[..., 0] - best[..., 1]) / np.abs(reference.logits).max(-1)


def _greedy_match(reference: Reference, tokens: np.ndarray, where: np.ndarray) -> bool:
    following = np.roll(tokens, -1, axis=1)
    return bool((reference.logits.argmax(-1) == following)[where].all())


def _first_bad_layer(
    reference: Reference,
    observed: Observed,
    where: np.ndarray,
    expert_errors: dict[int, float],
    sparse: list[int],
    tolerance: float,
) -> int | str | None:
    """Walks up the layers: one is bad when its experts, routing or output are off while its input was right."""
    states = list(zip(observed.hidden_states, reference.hidden_states, strict=True))
    if relative_error(*states[0], where) > tolerance:
        return "embedding"
    for layer in range(len(states) - 1):
        if not expert_errors.get(layer, 0.0) <= F32_TOLERANCE:
            return layer
        if layer in sparse:
            at = sparse.index(layer)
            got, want = (np.sort(x[at], axis=-1) for x in (observed.experts, reference.experts))
            if (got != want)[where].any():
                return layer
        if not relative_error(*states[layer + 1], where) <= tolerance:
            return layer
    return None


def _agreement(reference: Reference, observed: Observed, where: np.ndarray) -> tuple[float, float]:
    """Share of tokens with the same best id, and the mean KL divergence from the oracle in nats."""
    p, q = (_log_softmax(x[where].astype(np.float64)) for x in (reference.logits, observed.logits))
    return float((p.argmax(-1) == q.argmax(-1)).mean()), float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
