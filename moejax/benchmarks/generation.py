"""Prefill and decode of one batch, by moejax and by its peers, as contenders that take turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from moejax.benchmarks.interleave import Spread, interleave
from moejax.benchmarks.peers import Child
from moejax.benchmarks.work import Work
from moejax.inference.generate import Timing, generate
from moejax.language_model import LanguageModel
from moejax.model import Forward

OWN = "moejax"
Probe = TypeVar("Probe")


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts of one length, all alike long, and how far they are continued."""

    prompts: list[list[int]]
    new_tokens: int

    @classmethod
    def random(cls, vocabulary: int, size: int, input_len: int, output_len: int) -> "Batch":
        """Ids drawn evenly from the vocabulary, the same in every run."""
        ids = np.random.default_rng(0).integers(0, vocabulary, (size, input_len))
        return cls(ids.tolist(), output_len)

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])


@dataclass(frozen=True, slots=True)
class Run:
    """One run: seconds to the first tokens, seconds of all steps after, and the new tokens `[B][output_len]`."""

    first_s: float
    later_s: float
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender over the rounds.

    Attributes:
      ttft_s: prompts in to first tokens out.
      tpot_s: one step, in which each row gets a token.
      tokens: of the last run.
    """

    batch: Batch
    ttft_s: Spread
    tpot_s: Spread
    tokens: list[list[int]]

    @property
    def prefill_tok_s(self) -> float:
        return self.batch.size * self.batch.prompt_tokens / self.ttft_s.median

    @property
    def decode_tok_s(self) -> float:
        return self.batch.size / self.tpot_s.median

    @property
    def total_tok_s(self) -> float:
        """New tokens over the whole time, prompts included."""
        steps = self.batch.new_tokens - 1
        return self.batch.size * self.batch.new_tokens / (self.ttft_s.median + steps * self.tpot_s.median)


def own_contender(model: LanguageModel, batch: Batch) -> Callable[[], Run]:
    """Greedy through `moejax.generate`, without an end of sequence: what a caller waits for, host work included."""

    def run() -> Run:
        timing = Timing()
        outputs = generate(
            model,
            batch.prompts,
            max_new_tokens=batch.new_tokens,
            temperature=0.0,
            repetition_penalty=1.0,
            eos_ids=[],
            timing=timing,
        )
        return Run(timing.first_s, timing.later_s, [output.tokens for output in outputs])

    return run


def peer_contender(child: Child, experts: str, batch: Batch) -> Callable[[], Run]:
    """The same through transformers with one of its implementations of the experts."""

    def run() -> Run:
        child.ask("choose", experts=experts)
        return Run(**child.ask("generate", prompts=batch.prompts, new_tokens=batch.new_tokens))

    return run


def measure(
    contenders: dict[str, Callable[[], Run]],
    batch: Batch,
    rounds: int,
    tick: Callable[[str, int], None],
    probe: Callable[[], Probe],
) -> tuple[dict[str, Figures], list[Probe]]:
    """The figures of each contender, and what `probe` found in each round; all take turns in every round."""
    steps = batch.new_tokens - 1
    turns = interleave(contenders | {"the machine": probe}, rounds, tick)
    probes = cast(list[Probe], turns.pop("the machine"))
    figures = {
        name: Figures(
            batch,
            Spread.of([run.first_s for run in runs]),
            Spread.of([run.later_s / steps for run in runs]),
            runs[-1].tokens,
        )
        for name, runs in cast(dict[str, list[Run]], turns).items()
    }
    return figures, probes


def experts_hit(model: LanguageModel, work: Work, figures: Figures) -> tuple[float, ...]:
    """Distinct experts of each sparse layer that a decode step reads, on average over the steps.

    For one sequence that is K. For more it is counted from the routing of the tokens that were generated, a sequence at
    a time, so that no logits of a whole batch are held.
    """
    if figures.batch.size == 1 or not model.config.sparse:
        return work.expected_experts(1)
    # The last token is drawn but never run, the first of each row comes from the prefill.
    rows = [p + t[:-1] for p, t in zip(figures.batch.prompts, figures.tokens, strict=True)]
    chosen = [_routing(model, row, figures.batch.prompt_tokens) for row in rows]
    steps = range(figures.batch.new_tokens - 1)
    return tuple(
        float(np.mean([len({int(e) for row in chosen for e in row[layer][step]}) for step in steps]))
        for layer in range(len(model.config.sparse))
    )


def _routing(model: LanguageModel, row: Sequence[int], skip: int) -> list[np.ndarray]:
    """The experts `[S - skip, K]` of a sequence's tokens from number `skip` on, for each sparse layer."""
    out = model([list(row)], output_router_logits=True)
    assert isinstance(out, Forward)
    return [np.asarray(chosen)[skip:] for chosen in out.routed_experts]
