"""Manifold capacity against closed forms and against SciPy's non-negative least squares; JEPA-SCORE; isometry."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from lightning_collapse.functional.manifolds import jacobian_isometry, jepa_score, manifold_capacity, manifold_geometry

F64 = torch.float64


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("radius", "capacity"), [(0.0, 2.0), (0.5, 1.258), (1.0, 1.0), (5.0, 0.7276)])
def test_a_point_and_antipodal_pairs(radius: float, capacity: float) -> None:
    exact = 1 / (0.5 + 2 * math.atan(radius) / math.pi)
    assert exact == pytest.approx(capacity, abs=5e-4)
    found = manifold_geometry(torch.tensor([[radius], [-radius]]), directions=4000)
    assert (found.capacity - exact).abs() < 3 * found.error
    assert found.error / found.capacity < 2.5 / 4000**0.5
    state = torch.get_rng_state()
    assert manifold_geometry(torch.tensor([[radius], [-radius]]), directions=4000).capacity == found.capacity
    assert torch.equal(torch.get_rng_state(), state)


def reference(points: np.ndarray, t: np.ndarray) -> tuple[float, float, float]:
    """Direction by direction, by an active-set solver."""
    dim, energies, anchors = points.shape[1], [], []
    cone = np.hstack([points, np.ones((len(points), 1))])
    for one in t:
        weights, left = nnls(cone.T, one)
        energies.append(one @ one - left**2)
        opposed = points[np.argmax(points @ one[:dim])]
        anchors.append(weights @ points / weights.sum() if weights.sum() > 1e-12 else opposed)
    s = np.array(anchors)
    cosines = (s * t[:, :dim]).sum(axis=1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t[:, :dim], axis=1)
    spread = ((s - s.mean(axis=0)) ** 2).sum(axis=1).mean()
    return 1 / np.mean(energies), math.sqrt(spread), dim * cosines.mean() ** 2


@pytest.mark.parametrize("shape", [(15, 6), (8, 8)])
def test_geometry_is_that_of_non_negative_least_squares(shape: tuple[int, int]) -> None:
    points = 0.6 * rows(0, *shape)
    t = torch.randn(80, shape[1] + 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = manifold_geometry(points, directions=80, iterations=2000)
    assert [v.item() for v in found[:3]] == pytest.approx(reference(points.numpy(), t.numpy()), rel=1e-3)
    assert manifold_geometry(points, directions=80).capacity.item() == pytest.approx(found.capacity.item(), rel=1e-3)


def test_capacity_of_classes() -> None:
    centers, spread = 5 * rows(1, 4, 1, 40), rows(2, 4, 12, 40)
    tight, loose = (manifold_capacity(centers + scale * spread) for scale in (0.05, 2.0))
    assert (tight.capacity > loose.capacity).all()
    assert (tight.radius < loose.radius).all()
    assert tight.capacity.shape == (4,)
    moved = manifold_capacity(1000 + 7 * (centers + 0.05 * spread))  # neither place nor size matters
    torch.testing.assert_close(moved.capacity, tight.capacity, rtol=1e-6, atol=0)
    spoiled = centers + spread
    spoiled[0, 0, 0] = torch.nan
    assert manifold_capacity(spoiled).capacity.isnan().all()
    for bad in (torch.ones(4, 3), torch.ones(1, 4, 3)):
        with pytest.raises(ValueError, match="`manifolds` must have shape"):
            manifold_capacity(bad)
    with pytest.raises(ValueError, match="`offsets` must have shape"):
        manifold_geometry(torch.ones(3))


def test_jepa_score_of_a_linear_map_is_the_same_everywhere() -> None:
    linear = nn.Linear(6, 4).double()
    expected = torch.linalg.svdvals(linear.weight.detach()).log().sum()
    found = jepa_score(linear, rows(3, 5, 6))
    torch.testing.assert_close(found, expected.expand(5), rtol=1e-12, atol=1e-12)
    assert not found.requires_grad
    low = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)).double()
    product = torch.linalg.svdvals((low[1].weight @ low[0].weight).detach())[0]
    torch.testing.assert_close(jepa_score(low, rows(3, 1, 6))[0], product.log() + 2 * math.log(1e-6))


def test_jepa_score_is_that_of_each_samples_own_jacobian() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = rows(4, 6, 2, 4, 4)
    net(x)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"BatchNorm2d '1' uses the statistics of the batch. Call `model.eval\(\)`"):
        jepa_score(net, x)
    net.eval()
    jacobians = [torch.autograd.functional.jacobian(net, one.unsqueeze(0)).reshape(3, -1) for one in x]
    expected = torch.stack([torch.linalg.svdvals(jacobian).log().sum() for jacobian in jacobians])
    for chunk in (1, 4):
        torch.testing.assert_close(jepa_score(net, x, chunk_size=chunk), expected, rtol=1e-10, atol=1e-10)
    x[2, 0, 0, 0] = torch.nan
    assert jepa_score(net, x).isnan().tolist() == [i == 2 for i in range(6)]
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert jepa_score(net.float(), x[:2].float()).dtype == torch.float32


def test_jacobian_isometry_of_linear_maps_and_of_depth() -> None:
    orthogonal = nn.Sequential(*(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6, dtype=F64)) for _ in range(5)))
    x = rows(5, 3, 6)
    found = jacobian_isometry(orthogonal, x)
    torch.testing.assert_close(found.mean_square, torch.ones(3, dtype=F64))
    torch.testing.assert_close(found.spread, torch.zeros(3, dtype=F64), atol=1e-7, rtol=0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Unflatten(1, (3, 3)), nn.Flatten(), nn.Linear(9, 4)).double()
    found = jacobian_isometry(net, x, chunk_size=2)
    for sample, mean, spread in zip(x, *found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda s: net(s.unsqueeze(0))[0], sample)
        squares = torch.linalg.svdvals(jacobian).square()
        assert mean.item() == pytest.approx(squares.mean().item())
        assert spread.item() == pytest.approx((squares.std(correction=0) / squares.mean()).item())
    assert jacobian_isometry(nn.Threshold(9.0, 0.0), torch.ones(1, 3)).spread.isnan()
