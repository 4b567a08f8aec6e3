"""Options and corners of the notions of rank."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import (
    effective_rank,
    eigenvalue_effective_rank,
    nesum,
    numerical_rank,
    participation_ratio,
    rankme,
    srank,
    stable_rank,
    unbiased_participation_ratio,
)
from lightning_collapse.spectral import Spectrum, singular_values, spectrum_of


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def low_rank(n: int, d: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, rank), (rank, d)))
    return left @ right


def test_two_singular_values_by_hand() -> None:
    s = values(3.0, 1.0)
    assert effective_rank(s).item() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert eigenvalue_effective_rank(s).item() == pytest.approx(math.exp(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))))
    assert participation_ratio(s).item() == pytest.approx(100 / 82)
    assert stable_rank(s).item() == nesum(s).item() == pytest.approx(10 / 9)


def test_order_of_the_ranks() -> None:
    # Renyi entropies fall with their order; the singular values weigh the tail most
    s = torch.from_numpy(np.sort(np.random.default_rng(0).exponential(size=(50, 12)), axis=1)[:, ::-1].copy())
    ranks = [effective_rank(s), eigenvalue_effective_rank(s), participation_ratio(s), stable_rank(s)]
    for larger, smaller in zip(ranks, ranks[1:], strict=False):  # noqa: RUF007
        assert (larger > smaller).all()


def test_zeros_beyond_the_spectrum_change_nothing() -> None:
    s = values(4.0, 2.0, 1.0)
    padded = torch.cat([s, torch.zeros(50, dtype=torch.float64)])
    for rank in (effective_rank, eigenvalue_effective_rank, participation_ratio, stable_rank, nesum, srank):
        assert rank(padded).item() == pytest.approx(rank(s).item(), rel=1e-14)
    assert rankme(padded, eps=0.0).item() == pytest.approx(rankme(s, eps=0.0).item(), rel=1e-14)


def test_epsilon_of_rankme_is_added_after_normalization() -> None:
    s, eps = values(3.0, 1.0), 1e-2
    p = [0.75 + eps, 0.25 + eps]
    assert rankme(s, eps=eps).item() == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    assert rankme(s).item() == pytest.approx(rankme(s, eps=1e-7).item(), rel=1e-15)
    assert rankme(s, eps=0.0).item() == pytest.approx(effective_rank(s).item())


def test_epsilon_of_rankme_counts_the_singular_values_there_are() -> None:
    # of 4 rows there are 4 singular values, however the record was made
    record = spectrum_of(low_rank(4, 300, 4), center=False)
    padded = torch.cat([record.singular_values, torch.zeros(296, dtype=torch.float64)])
    longer = Spectrum(padded, record.count, record.dim)
    assert rankme(longer).item() == pytest.approx(rankme(record).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("delta", "expected"), [(0.0, 4), (0.05, 4), (0.1, 3), (0.3, 2), (0.31, 2), (0.5, 1), (0.9, 1)]
)
def test_srank_by_hand(delta: float, expected: int) -> None:
    # cumulative shares 0.5, 0.7, 0.9, 1.0
    assert srank(values(5.0, 2.0, 2.0, 1.0), delta=delta) == expected


@pytest.mark.parametrize("k", range(1, 301, 13))
def test_srank_of_equal_values_is_not_a_matter_of_rounding(k: int) -> None:
    for value in (0.1, 1 / 3, 7.0):
        for dtype in (torch.float32, torch.float64):
            assert srank(torch.full((k,), value, dtype=dtype)) == math.ceil(99 * k / 100)


def test_numerical_rank_counts_above_the_tolerance() -> None:
    s = values(1.0, 0.5, 1e-3, 1e-10)
    assert numerical_rank(s, rtol=1e-2) == 2
    assert numerical_rank(s, rtol=0.0) == 4
    assert numerical_rank(s) == 4
    assert numerical_rank(s.float()) == 3
    assert numerical_rank(s.float(), rtol=1e-12) == 4
    assert numerical_rank(torch.zeros(3), rtol=0.0) == 0
    assert numerical_rank(values(1.0, 2 * 3 * 2.0**-52, 1e-17)) == 2  # K eps, as numpy.linalg.matrix_rank
    assert numerical_rank(values(1.0, 0.5 * 3 * 2.0**-52, 1e-17)) == 1


@pytest.mark.parametrize(("n", "d", "expected"), [(10, 10, 2), (10, 200, 1), (200, 10, 1), (50, 50, 2)])
def test_tolerance_of_a_record_is_that_of_its_longer_side(n: int, d: int, expected: int) -> None:
    # 1e-5 is the float32 rounding of 84 rows or features
    assert numerical_rank(Spectrum(values(1.0, 1e-5), torch.tensor(float(n)), d)) == expected


@pytest.mark.parametrize("shape", [(200, 32), (32, 200), (40, 40)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_numerical_rank_of_low_rank_features(shape: tuple[int, int], rank: int) -> None:
    x = low_rank(*shape, rank)
    for features in (x, x.float(), 1000 * x.float()):
        assert numerical_rank(spectrum_of(features)) == rank
        assert numerical_rank(spectrum_of(features, center=False)) == rank


@pytest.mark.parametrize("shape", [(200, 32), (32, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numerical_rank_of_a_tensor_of_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # the two public functions together, as a user writes them
    assert numerical_rank(singular_values(low_rank(*shape, 5).to(dtype))) == 5


def test_unbiased_participation_ratio_of_few_rows() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (2, 3):
        assert unbiased_participation_ratio(spectrum_of(x[:n])).isnan()
    assert 1 <= unbiased_participation_ratio(spectrum_of(x[:4])) <= 3
    assert unbiased_participation_ratio(spectrum_of(torch.ones(9, 3))) == 0


def test_unbiased_participation_ratio_stays_in_its_range() -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        line = torch.randn(5, 1, generator=generator, dtype=torch.float64).expand(-1, 12) + 1e-3 * noise
        assert 1 <= unbiased_participation_ratio(spectrum_of(noise)) <= 12
        assert 1 <= unbiased_participation_ratio(spectrum_of(line)) <= 12


def test_half_precision_inflates_the_effective_rank_only() -> None:
    # rank-1 features with a tail of 1e-5, rounded to bfloat16
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(512, 1, generator=generator), torch.randn(1, 96, generator=generator)
    x = u @ v + 1e-5 * torch.randn(512, 96, generator=generator)
    exact, rounded = spectrum_of(x), spectrum_of(x.bfloat16())
    assert effective_rank(rounded) > effective_rank(exact) + 0.1
    assert eigenvalue_effective_rank(rounded).item() == pytest.approx(eigenvalue_effective_rank(exact).item(), rel=1e-3)
    assert participation_ratio(rounded).item() == pytest.approx(participation_ratio(exact).item(), rel=1e-3)
