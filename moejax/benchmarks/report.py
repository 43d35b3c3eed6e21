"""From figures to one JSON object: rates, ratios to the best peer, shares of this machine's limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moejax.benchmarks.generation import OWN, Figures
from moejax.benchmarks.interleave import Spread
from moejax.benchmarks.probes import Limit
from moejax.benchmarks.training import Trained
from moejax.benchmarks.work import Work


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the devices of the mesh, probed in turn with what is measured."""

    matrix: Limit
    read: Limit

    @classmethod
    def median(cls, probes: "Sequence[Limits]") -> "Limits":
        """Of one probe a round, each limit's median: on a shared machine they move within minutes, memory's by half."""

        def middle(limits: list[Limit]) -> Limit:
            return sorted(limits, key=lambda limit: limit.rate)[len(limits) // 2]

        return cls(middle([probe.matrix for probe in probes]), middle([probe.read for probe in probes]))

    def __str__(self) -> str:
        return (
            f"{self.matrix.rate / 1e9:.0f} GFLOP/s ({self.matrix.by}), "
            f"reading {self.read.rate / 1e9:.1f} GB/s ({self.read.by})"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "matrix_flops_per_s": self.matrix.rate,
            "matrix_by": self.matrix.by,
            "read_bytes_per_s": self.read.rate,
            "read_by": self.read.by,
        }


def batch_result(
    figures: Mapping[str, Figures], work: Work, experts_hit: tuple[float, ...], limits: Limits
) -> dict[str, Any]:
    """Everything about one batch: its rows, and moejax against the best of its peers where it had some.

    `prefill_share` is the FLOPs of the prompts a second over the matrix peak, `decode_share` the bytes of weights that
    a step reads at the least, a second, over the read bandwidth; see `Work`.
    """
    batch = figures[OWN].batch
    flops = batch.size * work.prefill_flops(batch.prompt_tokens)
    read = work.decode_bytes(experts_hit)
    rows = [
        {
            "contender": name,
            "ttft_s": f.ttft_s.as_json(),
            "tpot_s": f.tpot_s.as_json(),
            "prefill_tok_s": f.prefill_tok_s,
            "decode_tok_s": f.decode_tok_s,
            "total_tok_s": f.total_tok_s,
            "prefill_share": flops / f.ttft_s.median / limits.matrix.rate,
            "decode_share": read / f.tpot_s.median / limits.read.rate,
        }
        for name, f in figures.items()
    ]
    return {
        "batch_size": batch.size,
        "prefill_flops": flops,
        "decode_bytes": read,
        "experts_hit": sum(experts_hit) / len(experts_hit) if experts_hit else None,
        "limits": limits.as_json(),
        "rows": rows,
        "against": _against(figures),
    }


def _against(figures: Mapping[str, Figures]) -> dict[str, Any] | None:
    """The ratios to the best peer, for prefill and decode each; of the tokens of that one, the share that are ours."""
    own = figures[OWN]
    peers = {name: f for name, f in figures.items() if name != OWN}
    if not peers:
        return None
    prefill = max(peers, key=lambda name: peers[name].prefill_tok_s)
    decode = max(peers, key=lambda name: peers[name].decode_tok_s)
    pairs = [
        ours == theirs
        for row, other in zip(own.tokens, peers[decode].tokens, strict=True)
        for ours, theirs in zip(row, other, strict=True)
    ]
    return {
        "prefill_ratio": own.prefill_tok_s / peers[prefill].prefill_tok_s,
        "prefill_best_peer": prefill,
        "decode_ratio": own.decode_tok_s / peers[decode].decode_tok_s,
        "decode_best_peer": decode,
        "same_tokens": sum(pairs) / len(pairs),
    }


def train_result(
    figures: Mapping[str, Trained], tokens: int, least_s: float, peaks: Mapping[str, int]
) -> dict[str, Any]:
    """The rows of a training benchmark, and moejax against the best of its peers where it had some.

    Args:
      figures: of each contender.
      tokens: of one step.
      least_s: seconds that a step's FLOPs take at the matrix peak.
      peaks: the most memory that each contender's process held.
    """
    rows = [
        timed(
            f.seconds,
            contender=name,
            tok_s=tokens / f.seconds.median,
            peak_share=least_s / f.seconds.median,
            peak_bytes=peaks[name],
            losses=f.losses,
        )
        for name, f in figures.items()
    ]
    own, *peers = rows
    best = max(peers, key=lambda row: row["tok_s"], default=None)
    against = best and {
        "best_peer": best["contender"],
        "tok_ratio": own["tok_s"] / best["tok_s"],
        "peak_ratio": own["peak_bytes"] / best["peak_bytes"],
    }
    return {"rows": rows, "against": against}


def timed(spread: Spread, **facts: Any) -> dict[str, Any]:
    """A row of something that was timed alone."""
    return {**facts, "seconds": spread.as_json()}
