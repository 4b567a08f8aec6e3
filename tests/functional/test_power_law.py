"""The tail of spectra as a power law, against a naive search and known exponents."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.functional import power_law, power_law_alpha, power_law_null


def pareto(alpha: float, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) ** (-1 / (alpha - 1))


def naive(values: np.ndarray, min_tail: int) -> tuple[float, float, int, float, float]:
    """One candidate after the other."""
    best = (math.nan, math.inf, 0, math.nan, math.nan)
    for xmin in np.unique(values):
        tail = np.sort(values[values >= xmin])
        n = len(tail)
        if n < min_tail or tail[-1] == xmin:
            continue
        alpha = 1 + n / np.log(tail / xmin).sum()
        law = 1 - (tail / xmin) ** (1 - alpha)
        steps = np.arange(n + 1) / n
        distance = max(np.abs(law - steps[:-1]).max(), np.abs(law - steps[1:]).max())
        if distance < best[1]:
            best = (alpha, distance, n, (alpha - 1) / math.sqrt(n), xmin)
    return best


@pytest.mark.parametrize("chunk", [power_law.CHUNK, 1])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_naive_search(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_law, "CHUNK", chunk)
    rng = np.random.default_rng(seed)
    spectra = np.stack([pareto(2.5, 60, seed), rng.chisquare(5, 60), np.round(rng.gamma(2, size=60), 1) + 0.1])
    found = power_law_alpha(torch.from_numpy(spectra).view(1, 3, 60))
    for i, spectrum in enumerate(spectra):
        assert [x[0, i].item() for x in found] == pytest.approx(naive(spectrum, 10), rel=1e-9)


def test_exponent_of_exact_pareto_numbers() -> None:
    found = power_law_alpha(torch.from_numpy(np.stack([pareto(3, 2000, seed) for seed in range(8)])))
    assert found.alpha.mean().item() == pytest.approx(3, abs=0.06)
    assert ((found.alpha - 3).abs() < 4 * found.standard_error).all()
    assert (found.tail_count > 800).all()
    assert (found.ks_distance < 0.03).all()


def test_small_and_large_units() -> None:
    values = torch.from_numpy(pareto(3, 500, 0))
    expected = power_law_alpha(values)
    for scale in (2.0**-200, 2.0**200):
        found = power_law_alpha(values * scale)
        assert found.alpha.item() == pytest.approx(expected.alpha.item())
        assert found.xmin.item() == pytest.approx(scale * expected.xmin.item())


@pytest.mark.parametrize("shape", [(128, 128), (128, 512)])
def test_random_matrices_have_an_exponent_too_and_a_poor_fit(shape: tuple[int, int]) -> None:
    matrices = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = power_law_alpha(torch.linalg.svdvals(matrices).square())
    assert (found.alpha > 2.5).all()
    assert found.alpha.median() > 4
    assert (found.tail_count < 0.7 * 128).all()
    assert (found.ks_distance > 0.1).all()
    assert power_law_null(*shape) == pytest.approx(found.alpha.median().item(), rel=0.25)
    assert power_law_null(*shape) == power_law_null(*shape[::-1])
    assert math.isnan(power_law_null(9, 400))


def test_zeros_and_rounding_are_not_eigenvalues() -> None:
    values = torch.from_numpy(pareto(3, 300, 1))
    padded = torch.cat([values, torch.zeros(200).double(), torch.full((50,), 1e-18)])
    assert power_law_alpha(padded)[:4] == power_law_alpha(values)[:4]


@pytest.mark.parametrize(
    "values", [torch.zeros(50), torch.ones(50), torch.ones(4), torch.tensor([math.nan] + [2.0**i for i in range(30)])]
)
def test_nothing_to_fit(values: torch.Tensor) -> None:
    both = torch.stack([values, values])
    for found in (power_law_alpha(values), power_law_alpha(both)):
        assert found.alpha.isnan().all()
        assert found.ks_distance.isnan().all()
        assert (found.tail_count == 0).all()


def test_one_bad_spectrum_in_a_batch() -> None:
    values = torch.from_numpy(pareto(3, 100, 2)).float().repeat(3, 1)
    values[1, 5] = math.inf
    found = power_law_alpha(values)
    assert found.alpha.isnan().tolist() == [False, True, False]
    assert found.alpha[0] == power_law_alpha(values[0]).alpha
    assert found.alpha.dtype == torch.float32


def test_tail_of_one() -> None:
    with pytest.raises(ValueError, match="`min_tail` must be at least 2, got 1"):
        power_law_alpha(torch.ones(20), min_tail=1)


def test_eigenvalues_equal_to_rounding_are_no_power_law() -> None:
    orthogonal = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    law = power_law_alpha(torch.linalg.svdvals(orthogonal).square())
    assert law.alpha.isnan()
    assert law.tail_count == 0
