"""Published numbers of SIGReg, its quadratures and its directions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import SIGReg, sigreg_loss
from lightning_collapse.losses.support.directions import random_directions

FULL = {"paper": np.linspace(-5, 5, 17), "package": np.linspace(-3, 3, 33)}


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("quadrature", FULL)
def test_half_the_knots_are_the_whole_rule(quadrature: str) -> None:
    z, t = normal(50, 3) * 1.7 + 0.3, FULL[quadrature]
    directions = random_directions(3, 8, torch.tensor(5))
    expected = []
    for u in (z @ directions).numpy().T:
        error = np.exp(1j * np.outer(u, t)).mean(axis=0) - np.exp(-(t**2) / 2)
        integrand = np.abs(error) ** 2 * np.exp(-(t**2) / 2)
        expected.append(50 * np.sum((integrand[1:] + integrand[:-1]) / 2 * np.diff(t)))
    assert sigreg_loss(z, directions, quadrature).item() == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("quadrature", "perfect", "collapsed"), [("paper", 1.0594, 0.4089), ("package", 1.0527, 0.4022)]
)
def test_published_values(quadrature: str, perfect: float, collapsed: float) -> None:
    loss = SIGReg(64, quadrature)
    draws = [loss(normal(512, 64, seed)).item() for seed in range(40)]
    assert loss.value_at_perfection == pytest.approx(perfect, abs=3e-4)  # published for the integral
    assert np.mean(draws) == pytest.approx(perfect, abs=0.05)
    assert loss.at_collapse(100, 8) == pytest.approx(100 * collapsed, abs=3e-2)
    assert loss(torch.zeros(100, 8)).item() == pytest.approx(loss.at_collapse(100, 8), rel=1e-6)
    assert math.isnan(loss.value_at_collapse)


def test_limits() -> None:
    wide, far = 1e6 * normal(400, 4), torch.full((400, 4), 1e6, dtype=torch.float64)
    loss, spacing = SIGReg(slices=8192), 0.625
    # the integrals are sqrt(2 pi / 3) and sqrt(2 pi) more; no trapezoid sees the notch at 0
    assert loss(wide).item() / 400 == pytest.approx(math.sqrt(2 * math.pi / 3) - spacing, rel=0.01)
    both = math.sqrt(2 * math.pi) + math.sqrt(2 * math.pi / 3)
    assert loss(far).item() / 400 == pytest.approx(both - 2 * spacing, rel=0.02)
    assert loss(torch.ones(100, 8)).item() > loss.at_collapse(100, 8)


def test_directions_are_new_at_every_training_step_only() -> None:
    z, loss = normal(64, 6), SIGReg(slices=4)
    training = [loss(z).item() for _ in range(5)]
    assert len(set(training)) == 5
    assert int(loss.step) == 5
    loss.eval()
    assert loss(z).item() == loss(z).item()
    again = SIGReg(slices=4)
    assert [again(z).item() for _ in range(5)] == training
    assert SIGReg(slices=4, seed=1)(z).item() != training[0]


def test_directions_leave_the_random_numbers_of_the_training_alone() -> None:
    before = torch.random.get_rng_state()
    SIGReg()(normal(8, 4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_directions_are_uniform_on_the_sphere() -> None:
    """Moments of coordinates and of products, over elements and over steps, within five standard errors."""
    d, m = 8, 4096
    a = torch.stack([random_directions(d, m, torch.tensor(step)) for step in range(8)])
    torch.testing.assert_close(a.norm(dim=1), torch.ones(8, m, dtype=torch.float64))
    flat = a.transpose(1, 2).reshape(-1, d)
    n = len(flat)
    assert flat.mean(dim=0).abs().max() < 5 / math.sqrt(n * d)
    second = flat.T @ flat / n
    assert (second - torch.eye(d, dtype=torch.float64) / d).abs().max() < 5 * math.sqrt(2 / n) / d
    assert flat.pow(4).mean().item() == pytest.approx(3 / (d * (d + 2)), rel=0.02)
    # neighbours in count, step and stream know nothing of each other
    other = random_directions(d, m, torch.tensor(0), stream=1)
    for x, y in ((a[0], a[1]), (a[0], other), (a[0, :, 1:], a[0, :, :-1])):
        assert (x * y).sum(dim=0).mean().abs() < 5 / math.sqrt(d * m)


def test_new_directions_remove_a_dependence_that_fixed_ones_leave() -> None:
    """Figures 6 and 7 of the paper in small: two of 32 dimensions form an X, with fewer directions than dimensions."""
    left = {}
    for fresh in (True, False):
        z = normal(256, 32)
        z[:, 1] = z[:, 0] * z[:, 1].sign()
        z.requires_grad_()
        loss = SIGReg(slices=8).train(fresh)
        optimizer = torch.optim.Adam([z], lr=0.05)
        for _ in range(600):
            optimizer.zero_grad()
            loss(z).backward()
            optimizer.step()
        left[fresh] = torch.corrcoef(z.detach()[:, :2].square().T)[0, 1].item()
    assert left[True] < 0.4
    assert left[False] > 0.9


def test_only_one_matrix_of_projections_is_kept() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        SIGReg(slices=32)(normal(200, 4).requires_grad_())
    assert sum(kept) < 2 * 200 * 32


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`slices` must be an integer of at least 1, got 0"):
        SIGReg(slices=0)
    with pytest.raises(ValueError, match=r"`quadrature` must be one of \('paper', 'package'\), got 'simpson'"):
        SIGReg(quadrature="simpson")
    with pytest.raises(ValueError, match=r"`directions` must have shape \(4, M\), got \(3, 5\)"):
        sigreg_loss(normal(8, 4), torch.ones(3, 5))
