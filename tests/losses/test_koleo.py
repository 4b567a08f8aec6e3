"""KoLeo: closed forms, and what rows that repeat each other do."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_collapse.losses import KoLeo, koleo_loss


def gradient(features: torch.Tensor, **kwargs: float) -> torch.Tensor:
    features = features.clone().requires_grad_()
    koleo_loss(features, **kwargs).backward()
    assert features.grad is not None
    return features.grad


def test_closed_forms() -> None:
    opposite = torch.tensor([[3.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    assert koleo_loss(opposite).item() == pytest.approx(-math.log(2))
    for n in (3, 9, 33):  # a regular simplex, of any size
        simplex = 7 * (torch.eye(n, dtype=torch.float64) - 1 / n)
        assert koleo_loss(simplex).item() == pytest.approx(-0.5 * math.log(2 * n / (n - 1)))
    assert KoLeo(eps=1e-3)(torch.ones(4, 3)).item() == pytest.approx(-math.log(1e-3))
    angles = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert koleo_loss(circle).item() == pytest.approx(-math.log(2 * math.sin(math.pi / 12)), abs=1e-6)


def test_it_is_the_entropy_of_the_sphere() -> None:
    """Kozachenko and Leonenko: the mean log distance plus constants is the log of the sphere's area."""
    n, d = 4000, 3  # directions in 3 dimensions lie on a surface of 2
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = -(d - 1) * koleo_loss(rows).item() + math.log(math.pi) + math.log(n - 1) + 0.5772156649
    assert entropy == pytest.approx(math.log(4 * math.pi), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_repeated_rows_are_finite(dtype: torch.dtype, scale: float) -> None:
    rows = (scale * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    repeated = torch.cat([rows, rows[:4], 2 * rows[4:6], torch.zeros(2, 32, dtype=dtype)])
    grad = gradient(repeated)
    assert grad.isfinite().all()
    assert koleo_loss(repeated).isfinite()
    # a copy has no direction away from its original: neither moves on account of the other
    assert (grad[8:12] == 0).all()
    assert (grad[14:] == 0).all()
    assert koleo_loss(rows.repeat(2, 1)).item() == pytest.approx(-math.log(1e-8), rel=1e-6)


def test_neighbours_repel() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    moved = rows - 1e-3 * gradient(rows)
    before, after = (normalize(r[:2], dim=1).diff(dim=0).norm() for r in (rows, moved))
    assert after > before


def test_bad_eps() -> None:
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        KoLeo(eps=0)
