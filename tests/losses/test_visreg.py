"""Closed forms of VISReg, and its directions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import VISReg, visreg_terms
from lightning_collapse.losses.support.directions import random_directions
from tests.losses.cases.visreg import naive_visreg


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scale_and_center_are_told_apart() -> None:
    z = normal(400, 6)
    z = (z - z.mean(dim=0)) / z.std(dim=0, correction=0)
    base, loss = VISReg(slices=64).eval().terms(z), VISReg(slices=64).eval()
    wide, moved = loss.terms(3 * z), loss.terms(z + 5)
    assert base["scale"].item() == pytest.approx(0, abs=1e-12)
    assert base["center"].item() == pytest.approx(0, abs=1e-12)
    assert wide["scale"].item() == pytest.approx(4)
    assert wide["shape"].item() == pytest.approx(base["shape"].item(), abs=1e-3)
    assert moved["center"].item() == pytest.approx(25)
    assert moved["shape"].item() == pytest.approx(base["shape"].item())


def test_shape_sees_what_scale_and_center_do_not() -> None:
    """Normal rows, a folded line of unit variances, and two points."""
    line = normal(2000, 1)
    line = (line - line.mean()) / line.std(correction=0)
    loss = VISReg(slices=256).eval()
    good = loss.terms(normal(2000, 8))["shape"].item()
    folded = loss.terms(line.expand(-1, 8))["shape"].item()
    points = loss.terms(line.sign().expand(-1, 8))["shape"].item()
    assert good < 0.01 < 0.2 < folded < points


def test_collapse() -> None:
    loss = VISReg(scale=2.0, shape=3.0)
    assert loss(torch.zeros(50, 4)).item() == pytest.approx(loss.at_collapse(50, 4), rel=1e-6)
    assert loss.at_collapse(100_000, 4) == pytest.approx(5.0, abs=1e-3)
    assert math.isnan(loss.value_at_collapse)
    z = torch.zeros(8, 4, requires_grad=True)
    VISReg()(z).backward()
    assert z.grad.norm() > 0.1  # sorting breaks the tie, so equal rows are pushed apart


def test_gradient_leaves_the_divisor_alone() -> None:
    """Central differences of the reference, in which the standard deviation that features are divided by is fixed."""
    z = (2 * normal(5, 2) + 1).requires_grad_()
    VISReg()(z).backward()
    rows = z.detach().numpy()
    divisor = rows.std(axis=0) + 1e-4
    for i, j in np.ndindex(*rows.shape):
        step = np.zeros_like(rows)
        step[i, j] = 1e-6
        slope = (naive_visreg(rows + step, divisor) - naive_visreg(rows - step, divisor)) / 2e-6
        assert z.grad[i, j].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_are_finite(dtype: torch.dtype) -> None:
    for start in (torch.zeros(6, 4), torch.eye(4).repeat(2, 1), torch.full((2, 4), 1e-3), 16 * torch.eye(4)):
        z = start.to(dtype).requires_grad_()
        VISReg()(z).backward()
        assert z.grad.isfinite().all()


def test_global_scope_in_one_process_is_the_same() -> None:
    z = normal(16, 4)
    assert VISReg(scope="global")(z).item() == VISReg()(z).item()


def test_directions_are_new_at_every_training_step_only() -> None:
    z, loss = normal(64, 6), VISReg(slices=4)
    training = [loss(z).item() for _ in range(4)]
    assert len(set(training)) == 4
    loss.eval()
    assert loss(z).item() == loss(z).item()
    assert not loss.state_dict()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`slices` must be an integer of at least 1, got 0"):
        VISReg(slices=0)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        VISReg(eps=0)
    with pytest.raises(ValueError, match=r"`scope` must be one of \('rank', 'global'\), got 'node'"):
        VISReg(scope="node")
    with pytest.raises(ValueError, match=r"`directions` must have shape \(4, M\), got \(3, 5\)"):
        visreg_terms(normal(8, 4), random_directions(3, 5, torch.tensor(0)))
    assert "slices=4096, scale=1.0, shape=1.0, center=1.0, eps=0.0001, scope='rank'" in repr(VISReg())
