"""Closed forms of alignment and uniformity, and what their computation may cost."""

import math

import pytest
import torch

from lightning_collapse.losses import Alignment, Uniformity, alignment_loss, uniformity, uniformity_loss


def sphere(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("d", "published"), [(2, -1.575), (10, -3.2465), (64, -3.8752), (128, -3.9375)])
def test_the_uniform_law(d: int, published: float) -> None:
    assert Uniformity().at_perfection(10_000, d) == pytest.approx(published, abs=5e-4)
    assert uniformity_loss(sphere(5000, d)).item() == pytest.approx(Uniformity().at_perfection(5000, d), abs=5e-3)


@pytest.mark.parametrize("t", [0.5, 2.0, 10.0])
def test_the_sphere_in_three_dimensions(t: float) -> None:
    """There the cosine is uniform, and the mean of exp(2 t c) is sinh(2 t) / (2 t)."""
    assert Uniformity(t).at_perfection(99, 3) == pytest.approx(math.log(math.sinh(2 * t) / (2 * t)) - 2 * t)


def test_simplex_and_collapse() -> None:
    corners = torch.eye(33, dtype=torch.float64) - 1 / 33
    assert uniformity_loss(corners).item() == pytest.approx(-4.125)
    assert uniformity_loss(7 * corners).item() == pytest.approx(-4.125)
    constant = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    uniformity_loss(constant).backward()
    assert uniformity_loss(constant).item() == pytest.approx(0, abs=1e-12)
    assert constant.grad.abs().max() < 1e-12


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sphere(50, 6).requires_grad_()
    whole = uniformity_loss(rows)
    (expected,) = torch.autograd.grad(whole, rows)
    monkeypatch.setattr(uniformity, "BLOCK", 16)
    blocks = uniformity_loss(rows)
    (grad,) = torch.autograd.grad(blocks, rows)
    assert blocks.item() == pytest.approx(whole.item())
    torch.testing.assert_close(grad, expected)


def test_no_matrix_of_pairs_is_kept() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        uniformity_loss(sphere(200, 4).requires_grad_())
    assert kept
    assert max(kept) < 200 * 200


def test_alignment() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 3.0], [0.0, 9.0]], dtype=torch.float64)
    assert Alignment()(a, b).item() == pytest.approx(1.0)
    assert Alignment(alpha=1.0)(a, b).item() == pytest.approx(math.sqrt(2) / 2)
    assert Alignment(alpha=3.0)(a, -a).item() == pytest.approx(8.0)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_gradients_are_finite_where_views_agree_and_at_zero(alpha: float, dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1e-3, 0.0]], dtype=dtype, requires_grad=True)
    (alignment_loss(rows, rows.detach(), alpha) + uniformity_loss(rows)).backward()
    assert rows.grad.isfinite().all()
    assert (rows.grad[0] == 0).all()


def test_bad_hyperparameters() -> None:
    with pytest.raises(ValueError, match=r"`alpha` must be at least 1, got 0\.5: below"):
        Alignment(alpha=0.5)
    for t in (0.0, -1.0, 41.0, math.nan):
        with pytest.raises(ValueError, match=f"`t` must be positive and at most 40, got {t}"):
            Uniformity(t=t)
    assert "alpha=2.0" in repr(Alignment())
    assert "t=2.0" in repr(Uniformity())
