"""Deep CCA: the gradient of the paper, nulls, and what the ridge hides."""

import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import DCCA, TooFewRowsError, canonical_correlations, dcca_loss
from tests.losses.cases.dcca import naive_correlations


def views(rows: int, *dims: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rows, min(dims), generator=generator, dtype=torch.float64)
    noise = [torch.randn(rows, dim, generator=generator, dtype=torch.float64) for dim in dims]
    return [torch.cat([common, noise[i][:, : dim - min(dims)]], 1) + noise[i] for i, dim in enumerate(dims)]


@pytest.mark.parametrize("largest", [None, 2])
def test_gradient_is_that_of_the_paper(largest: int | None) -> None:
    """Equations 11 to 13, by roots and eigenvectors, of views of different widths."""
    first, second = (view.requires_grad_() for view in views(120, 6, 4))
    found = torch.autograd.grad(dcca_loss(first, second, largest=largest), [first, second])
    centered = [(view - view.mean(dim=0)).detach() for view in (first, second)]
    roots, m = [], len(first)
    for h in centered:
        values, vectors = torch.linalg.eigh(h.mT @ h / (m - 1) + 1e-3 * torch.eye(h.shape[1], dtype=h.dtype))
        roots.append(vectors @ torch.diag(values**-0.5) @ vectors.mT)
    u, d, vh = torch.linalg.svd(roots[0] @ (centered[0].mT @ centered[1] / (m - 1)) @ roots[1], full_matrices=False)
    u, d, vh = u[:, :largest], d[:largest], vh[:largest]
    across = roots[0] @ u @ vh @ roots[1]
    own = [-0.5 * root @ (w * d) @ w.mT @ root for root, w in zip(roots, (u, vh.mT), strict=True)]
    for i, cross in enumerate((across.mT, across)):
        expected = (2 * centered[i] @ own[i] + centered[1 - i] @ cross) / (m - 1)
        torch.testing.assert_close(found[i], -expected, rtol=1e-9, atol=1e-12)
    assert dcca_loss(first, second, largest=largest).item() == pytest.approx(-d.sum().item())


def test_the_shape_of_the_smaller_view_says_how_many() -> None:
    first, second = views(150, 6, 4)
    rho = canonical_correlations(first, second)
    assert rho.shape == (4,)
    assert rho.tolist() == pytest.approx(naive_correlations(first.numpy(), second.numpy(), 0.0).tolist())


@pytest.mark.parametrize(("rows", "total"), [(50, 3.77), (200, 1.82), (1000, 0.849)])
def test_null_of_unrelated_views(rows: int, total: float) -> None:
    """The mean over 20 draws; a small batch finds 3.8 of 10 where there is nothing.

    The mean square is that of the d x d matrix that T is for many rows, whose singular values, by the quarter-circle
    law, then add up to 8 / (3 pi) times d sqrt(d / (n - 1)), 0.849 of 1000 rows.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, rows, 10, generator=generator, dtype=torch.float64) for _ in range(20)]
    rho = torch.stack([canonical_correlations(*draw) for draw in draws])
    assert rho.square().sum(dim=1).mean().item() == pytest.approx(100 / (rows - 1), rel=0.1)
    assert rho.sum(dim=1).mean().item() == pytest.approx(total, rel=0.05)


def test_small_features_hide_behind_the_ridge_and_not_from_the_reading() -> None:
    first, second = views(200, 5, 5)
    plain = canonical_correlations(first, second)
    assert -dcca_loss(0.001 * first, 0.001 * second).item() < 0.02 * plain.sum().item()
    torch.testing.assert_close(canonical_correlations(0.001 * first, 0.001 * second), plain)
    shifted = canonical_correlations((first + 500).float(), (second + 500).float())
    torch.testing.assert_close(shifted.double(), plain, rtol=1e-3, atol=1e-3)


def test_few_rows_are_refused() -> None:
    rows = torch.randn(79, 4)
    with pytest.raises(TooFewRowsError, match="at least 80 rows over all processes, got 79"):
        DCCA()(rows, rows)
    assert DCCA(samples_per_feature=0)(rows, rows).item() == pytest.approx(-4, abs=0.01)


def test_misuse_is_refused() -> None:
    rows = torch.randn(100, 4)
    with pytest.raises(ValueError, match="`largest` must not be above the 2 correlations that there are, got 3"):
        dcca_loss(rows, rows[:, :2], largest=3)
    with pytest.raises(ValueError, match="must have as many rows, got 100 and 99"):
        dcca_loss(rows, rows[:99])
    with pytest.raises(ValueError, match="`largest` must be an integer of at least 1, got 0"):
        DCCA(largest=0)
    with pytest.raises(ValueError, match="`ridge` must not be negative, got -1"):
        DCCA(ridge=-1.0)
    bad = rows.index_fill(0, torch.tensor([0]), torch.nan)
    assert canonical_correlations(bad, rows).isnan().all()
