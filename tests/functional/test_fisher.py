"""Fisher discriminant ratio against canonical correlations, its null, and VCI, the other function of them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import fisher_discriminant_null, fisher_discriminant_ratio, vci
from lightning_collapse.spectral import ClassMoments

F64 = torch.float64


def draw(seed: int, n: int, dim: int, classes: int, apart: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    labels[:classes] = torch.arange(classes)
    centers = torch.randn(classes, dim, generator=generator, dtype=F64)
    return torch.randn(n, dim, generator=generator, dtype=F64) + apart * centers[labels], labels


def parts(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    moments = ClassMoments(int(labels.max()) + 1, rows.shape[1])
    moments.update(rows, labels)
    return moments.means, moments.within_scatter / len(rows), moments.count


def correlations(rows: Tensor, labels: Tensor) -> np.ndarray:
    """Squared canonical correlations of rows and one-hot labels, from orthonormal bases of both."""
    hot = np.eye(int(labels.max()) + 1)[labels.numpy()][:, 1:]
    bases = [np.linalg.qr(part - part.mean(axis=0))[0] for part in (rows.numpy(), hot)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2


@pytest.mark.parametrize("apart", [0.0, 1.0, 100.0])
def test_it_is_a_function_of_the_canonical_correlations_as_vci_is(apart: float) -> None:
    for dim, classes in ((9, 4), (2, 6)):
        rows, labels = draw(1, 300, dim, classes, apart)
        rho = correlations(rows, labels)
        found = fisher_discriminant_ratio(*parts(rows, labels)).item()
        assert found == pytest.approx((rho / (1 - rho)).sum(), rel=1e-12 * max(1, apart**2))
        assert 1 - vci(*parts(rows, labels)).item() == pytest.approx(rho.mean(), rel=1e-12)
        logged = fisher_discriminant_ratio(*parts(rows, labels), log=True).item()
        assert logged == pytest.approx(math.log(found), rel=1e-12)
    means, within, counts = parts(*draw(2, 80, 5, 2, 1.0))  # of two classes there is one correlation
    index = vci(means, within, counts)
    torch.testing.assert_close(
        fisher_discriminant_ratio(means, within, counts), (1 - index) / index, rtol=1e-12, atol=0
    )


def test_it_does_not_see_linear_maps_nor_what_does_not_vary() -> None:
    rows, labels = draw(3, 200, 5, 3, 1.0)
    plain = fisher_discriminant_ratio(*parts(rows, labels))
    scales = torch.tensor([1e-9, 1e9, 1.0, 1e-3, 1e3], dtype=F64)
    dead = torch.cat([rows * scales, torch.full((200, 2), 7.0, dtype=F64)], dim=1)
    torch.testing.assert_close(fisher_discriminant_ratio(*parts(dead, labels)), plain, rtol=1e-9, atol=0)
    twice = torch.cat([rows, rows[:, :2] - rows[:, 2:4]], dim=1)
    torch.testing.assert_close(fisher_discriminant_ratio(*parts(twice, labels)), plain, rtol=1e-9, atol=0)


def test_infinite_at_exact_collapse() -> None:
    means = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, 2.0]], dtype=F64)
    within = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=F64))
    for log in (False, True):
        assert fisher_discriminant_ratio(means, within, log=log) == math.inf
        assert fisher_discriminant_ratio(means, torch.zeros(3, 3, dtype=F64), log=log) == math.inf
    assert fisher_discriminant_ratio(means[:, 1:], within[1:, 1:]) == 0
    assert fisher_discriminant_ratio(means, torch.eye(3, dtype=F64), torch.tensor([5, 0])).isnan()
    few, labels = draw(4, 12, 20, 3)
    assert fisher_discriminant_ratio(*parts(few, labels)) == math.inf


def test_half_precision() -> None:
    rows, labels = draw(5, 400, 6, 3, 1.0)
    means, within, counts = parts(rows, labels)
    exact = fisher_discriminant_ratio(means, within, counts)
    found = fisher_discriminant_ratio(means.float(), within.float(), counts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_null() -> None:
    values = [fisher_discriminant_ratio(*parts(*draw(seed, 120, 12, 4))).item() for seed in range(200)]
    assert np.mean(values) == pytest.approx(fisher_discriminant_null(120, 4, 12), rel=0.05)
    assert fisher_discriminant_null(17, 4, 12) == math.inf
