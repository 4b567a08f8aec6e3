"""How evenly spectra are filled: closed forms and published numbers."""

import math

import numpy as np
import pytest
import torch

from lightning_collapse.functional import (
    eigenvalue_effective_rank,
    eigenvalue_quartile_ratio,
    quartile_ratio,
    stable_rank,
    svd_entropy,
)


def test_orthogonal_matrices_are_even() -> None:
    values = torch.linalg.svdvals(torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64)).Q)
    for measure in (svd_entropy, quartile_ratio, eigenvalue_quartile_ratio):
        assert measure(values).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("k", "n"), [(1, 8), (2, 8), (4, 8), (8, 8), (1, 1)])
def test_entropy_of_k_equal_values_of_n(k: int, n: int) -> None:
    values = torch.tensor([0.3] * k + [0.0] * (n - k), dtype=torch.float64)
    assert svd_entropy(values).item() == pytest.approx(math.log(k) / math.log(max(n, 2)), abs=1e-12)


def test_entropy_is_the_logarithm_of_the_rank() -> None:
    values = torch.rand(5, 20, dtype=torch.float64).sort(descending=True).values
    torch.testing.assert_close(20 ** svd_entropy(values), eigenvalue_effective_rank(values))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_quantiles_are_numpys(size: int) -> None:
    values = np.sort(np.random.default_rng(size).uniform(size=size))[::-1].copy()
    for measure, power in ((quartile_ratio, 1), (eigenvalue_quartile_ratio, 2)):
        third, first = np.percentile(values**power, [75, 25])
        assert measure(torch.from_numpy(values)).item() == pytest.approx(third / first)


def test_quartiles_of_what_is_mostly_zero() -> None:
    for measure in (quartile_ratio, eigenvalue_quartile_ratio):
        assert measure(torch.tensor([3.0, 2.0, 0.0, 0.0])) == math.inf
        assert measure(torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])) == 0


@pytest.mark.parametrize(
    ("shape", "entropy", "rank", "stable", "quartiles", "of_squares"),
    [((256, 256), 0.910, 0.607, 0.257, 3.25, 10.5), ((256, 1024), 0.977, 0.882, 0.444, 1.55, 2.39)],
)
def test_gaussian_matrices(
    shape: tuple[int, int], entropy: float, rank: float, stable: float, quartiles: float, of_squares: float
) -> None:
    found = []
    for seed in range(3):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = torch.linalg.svdvals(matrix)
        measures = (svd_entropy, eigenvalue_effective_rank, stable_rank, quartile_ratio, eigenvalue_quartile_ratio)
        found.append([measure(values).item() for measure in measures])
    mean = np.mean(found, axis=0) / np.array([1, 256, 256, 1, 1])
    assert mean == pytest.approx([entropy, rank, stable, quartiles, of_squares], rel=0.02)
