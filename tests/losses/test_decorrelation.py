"""The feature decorrelation of SimTPR: both conventions, and features without variance."""

import pytest
import torch

from lightning_collapse.losses import FeatureDecorrelation
from tests.losses.cases.base import correlated, whitened


def test_conventions() -> None:
    a, b = correlated((12, 5), 2)
    paper, code = FeatureDecorrelation(), FeatureDecorrelation(convention="code")
    assert code.terms(a, b)["redundancy"].item() == pytest.approx(
        (11 / 12) ** 2 * paper.terms(a, b)["redundancy"].item()
    )
    white, _ = whitened(2)
    assert paper(white, white).item() == pytest.approx(0, abs=1e-9)
    assert code(white, white).item() == pytest.approx(15 / 16**2)
    assert code.at_perfection(16, 15) == pytest.approx(15 / 16**2)
    # what the released code does, where it can: unbiased deviations, a mean over rows
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (a, b))
    c = ((u - u.mean(0)) / u.std(0)).T @ ((v - v.mean(0)) / v.std(0)) / 12
    off = c - torch.diag(c.diagonal())
    expected = (1 - c.diagonal()).square().sum() + 0.005 * off.square().sum()
    assert code(a, b).item() == pytest.approx(expected.item(), rel=1e-9)


def test_views_that_disagree() -> None:
    white, _ = whitened(2)
    assert FeatureDecorrelation()(white, -white).item() == pytest.approx(4 * 15)
    assert FeatureDecorrelation()(white, white.roll(1, dims=1)).item() == pytest.approx(15 + 0.005 * 15)


def test_length_of_rows_does_not_matter() -> None:
    a, b = correlated((12, 5), 2)
    stretch = torch.rand(12, 1, dtype=torch.float64) + 0.5
    assert FeatureDecorrelation()(stretch * a, b).item() == pytest.approx(FeatureDecorrelation()(a, b).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dead_features_and_rows_are_finite(dtype: torch.dtype) -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = 0
    rows[3] = 0
    rows = rows.to(dtype).requires_grad_()
    loss = FeatureDecorrelation()(rows, rows)
    loss.backward()
    assert rows.grad is not None
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`convention` must be one of \('paper', 'code'\), got 'released'"):
        FeatureDecorrelation(convention="released")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        FeatureDecorrelation(eps=0)
