"""Codebook collapse: what is said of histograms that a codebook of a known distribution leaves."""

import pytest
import torch

from lightning_collapse.functional import assignment_null, code_counts, code_perplexity, dead_codes, missed_hits
from lightning_collapse.rules import Judge
from lightning_collapse.utilities.points import Point

K = 256


def told(distributions, n=8192, **others):
    """What a judge says of one codebook whose rows choose by one distribution after the other."""
    judge, generator = Judge(["codebook_collapse"]), torch.Generator().manual_seed(0)
    missed, history = torch.zeros(K).double(), torch.zeros(K, dtype=torch.int64)
    for step, p in enumerate(distributions):
        counts = code_counts(torch.multinomial(p, n, replacement=True, generator=generator), K)[:-1]
        missed, history = missed_hits(missed, counts, history), history + counts
        values = {
            "perplexity": float(code_perplexity(counts)),
            "dead": float(dead_codes(missed, history).double().mean()),
        }
        null = assignment_null(n, K)
        judge.update([Point("codebook", "vq", name, step, value, n, null) for name, value in (values | others).items()])
    return judge


def first(codes, power=0.0):
    p = torch.arange(1, K + 1).double() ** -power
    return p * (torch.arange(K) < codes)


EVEN = first(K)
HEALTHY = {
    "even use": [EVEN] * 30,
    "skewed data with rare codes": [first(K, 1.5)] * 30,
    "even at first, then as skewed as the data": [EVEN] * 3 + [first(K, 1.3)] * 30,
    "fresh from k-means, and codes sharpen": [first(K, 0.05 * min(step, 16)) for step in range(40)],
    "few codes at first, others are drawn along": [first(min(4 + 12 * step, K)) for step in range(40)],
    "later level, flatter": [first(K, 0.3 / (1 + step)) for step in range(30)],
    "a third of the codes unused": [first(170)] * 30,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_codebooks_are_no_failure(name):
    judge = told(HEALTHY[name])
    assert judge.verdicts == judge.notices == []


def test_small_batches_are_no_failure():
    assert told([first(K, 1.2)] * 40, n=64).verdicts == []
    assert told([EVEN] * 40, n=32).verdicts == []


def test_collapse_from_the_start_and_later_on():
    assert told([first(8)] * 40).verdicts == []  # they may be drawn along yet
    [verdict] = told([first(8)] * 80).verdicts
    assert (verdict.kind, verdict.layer) == ("codebook_collapse", "vq")
    assert verdict.step == 41
    assert "97 % of them are dead" in verdict.evidence
    shrinking = [first(max(K - 12 * max(step - 20, 0), 6)) for step in range(50)]
    [verdict] = told([*shrinking]).verdicts
    assert 30 < verdict.step < 40


def test_a_codebook_that_nobody_trains_is_a_notice():
    judge = told([first(8)] * 80, motion=0.0, quantization_error=0.5)
    assert judge.verdicts == []
    assert [notice.kind for notice in judge.notices] == ["codebook_collapse"]
    assert told([first(8)] * 80, motion=0.01, quantization_error=0.5).verdicts
    assert told([first(8)] * 80, motion=0.0).verdicts  # frozen behind a matrix that is trained
