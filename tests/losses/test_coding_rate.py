"""Closed forms of the coding rate and of MMCR."""

import math

import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import MMCR, CodingRate, coding_rate_loss, mmcr_terms
from lightning_collapse.losses.support.products import logdet, product


def rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_published_coding_rates() -> None:
    isotropic = torch.linalg.qr(rows(64, 64))[0].repeat(2, 1)
    assert coding_rate_loss(isotropic).item() == pytest.approx(-57.336, abs=1e-3)
    assert CodingRate().at_perfection(128, 64) == pytest.approx(-57.336, abs=1e-3)
    assert coding_rate_loss(torch.ones(100, 64)).item() == pytest.approx(-2.886, abs=1e-3)
    assert CodingRate().at_collapse(100, 64) == pytest.approx(-2.886, abs=1e-3)
    few = torch.linalg.qr(rows(8, 8))[0][:3]
    assert coding_rate_loss(few).item() == pytest.approx(CodingRate().at_perfection(3, 8))


def test_scale_and_zeros() -> None:
    z = rows(6, 4)
    assert coding_rate_loss(9 * z).item() == pytest.approx(coding_rate_loss(z).item())
    assert coding_rate_loss(torch.zeros(5, 4)).item() == 0


def test_published_mmcr() -> None:
    z = torch.linalg.qr(rows(64, 64))[0].repeat(64, 1)
    assert MMCR()(z, z).item() == pytest.approx(-512.0)
    assert MMCR().at_perfection(4096, 64) == pytest.approx(-512.0)
    constant = torch.ones(4096, 64, dtype=torch.float64)
    assert MMCR()(constant, constant).item() == pytest.approx(-64.0)


def test_local_nuclear_norm_is_that_of_the_views() -> None:
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (rows(7, 3), rows(7, 3).flip(0)))
    expected = torch.stack([a, b], dim=2).norm(p="nuc", dim=(1, 2)).mean()
    assert mmcr_terms(a, b)["local"].item() == pytest.approx(expected.item())
    assert MMCR(local=0.5)(a, b).item() == pytest.approx(MMCR()(a, b).item() + expected.item() / 2)
    assert MMCR(local=0.5).at_perfection(8, 4) == pytest.approx(math.sqrt(0.5) - math.sqrt(32))
    assert mmcr_terms(a, a)["local"].item() == pytest.approx(math.sqrt(2))


def test_mmcr_pulls_equal_rows_apart() -> None:
    """The nuclear norm has a corner where a singular value vanishes."""
    z = torch.ones(8, 4, requires_grad=True)
    MMCR()(z, z).backward()
    assert z.grad.isfinite().all()
    assert z.grad.norm() > 0.01
    assert MMCR()(z - 0.1 * z.grad, z - 0.1 * z.grad) < MMCR()(z, z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["zeros", "duplicates", "single"])
def test_gradients_are_finite(kind: str, dtype: torch.dtype) -> None:
    start = {"zeros": torch.zeros(6, 4), "duplicates": torch.eye(4).repeat(2, 1), "single": torch.ones(1, 4)}[kind]
    z = start.to(dtype).requires_grad_()
    (coding_rate_loss(z) + MMCR(local=1.0)(z, z)).backward()
    assert z.grad.isfinite().all()


def test_gradient_of_the_determinant() -> None:
    z = rows(5, 5)
    matrix = (z @ z.T + torch.eye(5)).requires_grad_()
    assert logdet(matrix).item() == pytest.approx(torch.logdet(matrix).item())
    (grad,) = torch.autograd.grad(logdet(matrix), matrix)
    torch.testing.assert_close(grad, torch.linalg.inv(matrix.detach()))
    assert logdet(-torch.eye(3)).isnan()
    assert torch.autograd.gradgradcheck(product, [rows(3, 4).requires_grad_(), rows(4, 2).requires_grad_()])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        CodingRate(eps=0)
    assert "eps=0.2" in repr(CodingRate())
    assert "local=0.0" in repr(MMCR())
