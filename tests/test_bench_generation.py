"""Contenders, their figures, and which experts a decode step reads."""

import numpy as np
import pytest

import moejax
from moejax.benchmarks.generation import OWN, Batch, Figures, Run, experts_hit, measure, own_contender
from moejax.benchmarks.interleave import Spread
from moejax.benchmarks.probes import Limit
from moejax.benchmarks.report import Limits, batch_result
from moejax.benchmarks.work import Work


@pytest.fixture(scope="module")
def model(mesh):
    return moejax.load("demo", mesh=mesh("ep=2,tp=1"), dtype="float32")


def test_the_own_contender_generates_greedily_to_the_end(model):
    batch = Batch.random(model.config.vocab_size, 3, 5, 4)
    run = own_contender(model, batch)()
    outputs = moejax.generate(model, batch.prompts, max_new_tokens=4, temperature=0.0, eos_ids=[])
    assert run.tokens == [output.tokens for output in outputs]
    assert all(len(row) == 4 for row in run.tokens)
    assert run.first_s > 0 and run.later_s > 0


def test_experts_hit_are_those_of_the_tokens_that_were_decoded(model):
    batch = Batch.random(model.config.vocab_size, 3, 5, 4)
    figures, _ = measure({OWN: own_contender(model, batch)}, batch, 1, lambda name, number: None, lambda: None)
    hit = experts_hit(model, Work.of(model.config), figures[OWN])
    rows = np.array([p + t for p, t in zip(batch.prompts, figures[OWN].tokens, strict=True)])
    chosen = model(rows, output_router_logits=True).routed_experts
    for layer, experts in enumerate(chosen):
        steps = np.asarray(experts).reshape(3, 9, -1)[:, 5:8]
        assert hit[layer] == np.mean([len(np.unique(steps[:, step])) for step in range(3)])


def test_one_sequence_reads_as_many_experts_as_a_token_chooses(model):
    spread = Spread.of([1.0])
    figures = Figures(Batch([[1, 2]], 3), spread, spread, [[3, 4, 5]])
    top = model.config.layers[0].moe.num_experts_per_tok
    assert experts_hit(model, Work.of(model.config), figures) == pytest.approx((top,) * len(model.config.sparse))


def test_ratios_are_to_the_best_peer_of_each_phase_and_shares_are_of_the_limits(model):
    batch = Batch([[1, 2], [3, 4]], 3)

    def fake(first_s: float, later_s: float, token: int = 7):
        return lambda: Run(first_s, later_s, [[5, 6, token]] * 2)

    contenders = {OWN: fake(1.0, 2.0), "early": fake(1.5, 9.0), "late": fake(4.0, 3.0, token=8)}
    work = Work.of(model.config, "float32")
    hit = work.expected_experts(2)
    rounds = iter(range(4))
    figures, probes = measure(contenders, batch, 3, lambda name, number: None, lambda: next(rounds))
    assert probes == [1, 2, 3]  # not that of the warm-up
    result = batch_result(figures, work, hit, Limits(Limit(1e9, "a"), Limit(1e9, "b")))
    own = result["rows"][0]
    assert (own["prefill_tok_s"], own["decode_tok_s"], own["total_tok_s"]) == (4.0, 2.0, 2.0)
    assert own["prefill_share"] == pytest.approx(2 * work.prefill_flops(2) / 1e9)
    assert own["decode_share"] == pytest.approx(work.decode_bytes(hit) / 1.0 / 1e9)
    against = result["against"]
    assert (against["prefill_best_peer"], against["prefill_ratio"]) == ("early", pytest.approx(1.5))
    assert (against["decode_best_peer"], against["decode_ratio"]) == ("late", pytest.approx(1.5))
    assert against["same_tokens"] == pytest.approx(2 / 3)


def test_each_limit_is_the_median_of_its_probes():
    first, second, third = (
        Limits(Limit(matrix, "a"), Limit(read, "b")) for matrix, read in ((1.0, 4.0), (2.0, 3.0), (5.0, 9.0))
    )
    assert Limits.median([first, second, third]) == Limits(Limit(2.0, "a"), Limit(4.0, "b"))
    assert Limits.median([first]) == first
