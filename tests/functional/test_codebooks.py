"""Usage, death and drift of codebooks: closed forms, published numbers of nulls, and plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.functional import (
    assignment_null,
    churn,
    code_counts,
    code_perplexity,
    codebook_motion,
    dead_codes,
    miller_madow,
    missed_hits,
    nearest_codes,
    quantization_reading,
    quantization_sums,
    unseen_mass,
    usage,
    usage_null,
)
from lightning_collapse.functional.codebooks import moved_idle_codes


def draw(n, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return code_counts(torch.multinomial(p, n, replacement=True, generator=generator), len(p))[:-1]


def zipf(codes):
    p = 1 / torch.arange(1, codes + 1).double()
    return p / p.sum()


def poisson_null(n, codes):
    """``n exp(-(K / n) E[c ln c])`` for a Poisson count, which the binomial one is near to."""
    mean = n / codes
    terms = (math.exp(c * math.log(mean) - mean - math.lgamma(c + 1)) * c * math.log(c) for c in range(1, 400))
    return n * math.exp(-sum(terms) / mean)


@pytest.mark.parametrize(("n", "codes", "told"), [(512, 512, 288.6), (2048, 512, 448.2), (8192, 8192, 4617)])
def test_the_null_of_the_perplexity(n, codes, told):
    assert poisson_null(n, codes) == pytest.approx(told, abs=0.5)
    assert assignment_null(n, codes) == pytest.approx(told, rel=1e-3)
    found = code_perplexity(draw(n, torch.ones(codes).double()))
    assert found.item() == pytest.approx(told, abs=4 * {(512, 512): 7.2, (2048, 512): 3.5}.get((n, codes), 30))


def test_the_null_of_usage():
    assert [round(usage_null(n, 512), 3) for n in (512, 2048)] == [0.632, 0.982]
    assert math.isnan(usage_null(0, 512))
    assert usage(draw(2048, torch.ones(512).double())).item() == pytest.approx(0.982, abs=0.025)


@pytest.mark.parametrize(("n", "plug_in", "corrected", "unseen"), [(2048, 236, 284, 0.264), (16384, 376, 407, 0.0704)])
def test_few_choices_of_skewed_codes(n, plug_in, corrected, unseen):
    """The perplexity of the distribution is 431: no estimate reaches it, and the unseen mass says by how much."""
    drawn = [draw(n, zipf(4096), seed) for seed in range(8)]
    for function, told in ((code_perplexity, plug_in), (miller_madow, corrected), (unseen_mass, unseen)):
        mean = torch.stack([function(counts) for counts in drawn]).mean().item()
        assert mean == pytest.approx(told, rel=0.04), function


def test_counting():
    indices = torch.tensor([[3, -1], [0, 9]], dtype=torch.int32)
    assert code_counts(indices, 4).tolist() == [1, 0, 0, 1, 2]
    assert code_counts(indices[:0], 4).tolist() == [0] * 5
    with pytest.raises(TypeError, match=r"whole numbers, got torch.float32"):
        code_counts(torch.zeros(2), 4)
    with pytest.raises(TypeError, match=r"torch.bool"):
        code_counts(torch.zeros(2) > 0, 4)
    for function in (usage, code_perplexity, unseen_mass):
        assert function(torch.zeros(4, dtype=torch.int64)).isnan(), function


def stream(p, n, windows, seed=0):
    codes = len(p if torch.is_tensor(p) else p[0])
    missed, history = torch.zeros(codes).double(), torch.zeros(codes, dtype=torch.int64)
    for window in range(windows):
        counts = draw(n, p if torch.is_tensor(p) else p[window], 100 * seed + window)
        missed, history = missed_hits(missed, counts, history), history + counts
    return missed, history


def test_missed_hits_are_a_plain_sum():
    rng = np.random.default_rng(0)
    windows = rng.poisson([4, 0.3, 0.1, 0.0], size=(12, 4))
    expected, past = np.zeros(4), np.zeros(4)
    found, history = torch.zeros(4).double(), torch.zeros(4, dtype=torch.int64)
    for window in windows:
        for k in range(4):
            share = past[k] / past.sum() if past[k] else 1 / 4
            expected[k] = 0 if window[k] else expected[k] + window.sum() * share
        past += window
        counts = torch.tensor(window)
        found, history = missed_hits(found, counts, history), history + counts
    assert found.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("p", [torch.ones(512).double(), zipf(512), zipf(4096)], ids=["even", "skewed", "rare"])
def test_rare_codes_are_not_dead(p):
    missed, history = stream(p / p.sum(), 4096, 12)
    assert dead_codes(missed, history).sum() == 0


def test_dead_codes_are_dead():
    few = torch.zeros(512).double()
    few[:8] = 1
    missed, history = stream(few, 512, 10)  # ten hits each would be even
    assert dead_codes(missed, history).sum() == 0
    missed, history = stream(few, 4096, 3)  # from the beginning
    assert dead_codes(missed, history).nonzero().flatten().tolist() == list(range(8, 512))
    even = torch.ones(64).double()
    half = torch.cat([torch.ones(32), torch.zeros(32)]).double()
    missed, history = stream([even] * 3 + [half] * 4, 1024, 7)  # later on
    assert dead_codes(missed, history).nonzero().flatten().tolist() == list(range(32, 64))


def test_quantization_is_a_plain_loop_far_from_the_origin_and_in_any_pieces():
    generator = torch.Generator().manual_seed(0)
    rows = 1e4 + torch.randn(40, 3, generator=generator).double()
    table = 1e4 + torch.randn(5, 3, generator=generator).double()
    chosen = [min(range(5), key=lambda k, z=z: float((z - table[k]).square().sum())) for z in rows]
    assert nearest_codes(rows - 1e4, table - 1e4).tolist() == chosen
    error = sum(float((z - table[k]).square().sum()) for z, k in zip(rows, chosen, strict=True))
    spread = sum(float((z - rows.mean(dim=0)).square().sum()) for z in rows)
    sums = quantization_sums(rows[:7], table[chosen[:7]]) + quantization_sums(rows[7:], table[chosen[7:]])
    found = quantization_reading(sums)
    assert found.error.item() == pytest.approx(error / spread, rel=1e-4)
    assert found.scale.item() == pytest.approx(1.0, abs=1e-3)
    lost = torch.cat([rows, torch.full((2, 3), math.nan).double()])
    assert torch.equal(
        quantization_sums(lost, torch.cat([table[chosen], table[:2]])), quantization_sums(rows, table[chosen])
    )
    assert quantization_reading(quantization_sums(rows[:1], table[:1])).error.isnan()


def test_drift():
    before = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.full((64,), 50)
    counts[60:] = 0
    now = before.clone()
    now[61] = -before[61]
    now[3] *= 1.5
    assert moved_idle_codes(before, now, counts) == 1  # the other one was in use
    assert moved_idle_codes(before, before, counts) == 0
    assert codebook_motion(before, now, counts).item() == pytest.approx(0.5 * 50 / 3000)
    assert codebook_motion(before.half(), before.half(), counts).dtype == torch.float32
    assert churn(torch.arange(4), torch.arange(4)).item() == 0
