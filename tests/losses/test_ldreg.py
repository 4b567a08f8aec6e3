"""LDReg: known dimensions, and what its two published forms do."""

import math

import pytest
import torch
from torch import Tensor

from lightning_collapse.functional import local_intrinsic_dimension
from lightning_collapse.losses import LDReg, ldreg_loss
from tests.losses.cases.base import correlated
from tests.losses.cases.neighbors import naive_ldreg


def gaussian(rows: int, dim: int, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return features @ torch.randn(dim, width, generator=generator, dtype=torch.float64)


def gradient(features: Tensor, loss: LDReg) -> Tensor:
    features = features.clone().requires_grad_()
    loss(features).backward()
    assert features.grad is not None
    return features.grad


@pytest.mark.parametrize(("dim", "tolerance"), [(2, 0.2), (5, 0.4)])
def test_known_dimensions(dim: int, tolerance: float) -> None:
    """On an isotropic Gaussian, in orthogonal coordinates."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, dim, generator=generator) @ torch.eye(dim, 30)
    assert math.exp(-ldreg_loss(features).item()) == pytest.approx(dim, abs=tolerance)


def test_it_is_the_geometric_mean_of_local_dimensions() -> None:
    features = gaussian(300, 6)
    local = local_intrinsic_dimension(features, k=20, method="moments").local
    assert ldreg_loss(features, k=20, eps=1e-12).item() == pytest.approx(-local.log().mean().item(), rel=1e-6)


def test_forms() -> None:
    """A released loss of absolute values falls where the dimension falls below 1."""
    (features,) = correlated((12, 6), 1)
    assert ldreg_loss(features, form="released").item() == pytest.approx(naive_ldreg(features.numpy(), "released"))
    line = torch.tensor([[0.0], [0.01], [0.02], [0.03], [0.05], [9.0], [9.02], [9.04], [9.06], [9.09]])
    k = 5  # four neighbours near and the fifth far: less than one dimension
    assert ldreg_loss(line, k).item() > 0
    assert ldreg_loss(line, k, "released").item() == pytest.approx(-ldreg_loss(line, k).item())
    assert torch.allclose(gradient(line, LDReg(k)), -gradient(line, LDReg(k, "released")))
    assert LDReg(form="released").value_at_collapse == LDReg().value_at_perfection


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradient_moves_a_row_among_resting_neighbours(form: str) -> None:
    """The derivative with the reference held still, row by row, against finite differences."""
    (features,) = correlated((9, 4), 1)
    grad = gradient(features, LDReg(k=5, form=form))  # type: ignore[arg-type]
    step = 1e-6

    def own(i: int, row: Tensor) -> float:
        others = torch.cat([features[:i], features[i + 1 :]])
        near = (others - row).norm(dim=1).sort().values[:5]
        share = near[:-1].mean() / near[-1]
        value = ((share + 1e-4) / (1 - share + 1e-4)).log()
        return -(value.abs() if form == "released" else value).item() / len(features)

    for i in range(len(features)):
        for j in range(features.shape[1]):
            up, down = features[i].clone(), features[i].clone()
            up[j] += step
            down[j] -= step
            assert grad[i, j].item() == pytest.approx((own(i, up) - own(i, down)) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_repeated_and_equidistant_rows_are_finite(dtype: torch.dtype) -> None:
    rows = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for features in (rows.repeat(3, 1), rows[:1].repeat(12, 1), torch.eye(8, dtype=dtype), torch.eye(2).repeat(6, 1)):
        assert LDReg()(features).isfinite()
        assert gradient(features, LDReg()).isfinite().all()


def test_scale_does_not_matter() -> None:
    features = gaussian(50, 4)
    assert LDReg(k=8)(1e3 * features).item() == pytest.approx(LDReg(k=8)(features).item())
    assert LDReg(k=8)(1e-6 * features).item() == pytest.approx(LDReg(k=8)(features).item())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`k` must be an integer of at least 2, got 1"):
        LDReg(k=1)
    with pytest.raises(ValueError, match=r"`form` must be one of \('paper', 'released'\), got 'l2'"):
        LDReg(form="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        LDReg(eps=0)
    with pytest.raises(ValueError, match="needs at least 4 rows over all processes, got 3"):
        LDReg()(torch.randn(3, 2))
