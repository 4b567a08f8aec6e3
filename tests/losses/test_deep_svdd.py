"""Deep SVDD: constant features are no minimum, what stays, and what the batch's own covariance cannot see."""

import pytest
import torch

from lightning_collapse.losses import DeepSVDD, svdd_scores
from lightning_collapse.losses.support.state import recall, remembered


def trained(loss: DeepSVDD) -> torch.Tensor:
    """Standard deviations of free features, 256 rows of 3, after gradient descent."""
    generator = torch.Generator().manual_seed(0)
    features = (1 + 0.2 * torch.randn(256, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.SGD([features], lr=40.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss(features).backward()
        optimizer.step()
    return features.detach().std(dim=0)


def test_the_minimum_is_at_half_the_coefficient_and_not_at_collapse() -> None:
    torch.testing.assert_close(trained(DeepSVDD()), torch.full((3,), 0.5, dtype=torch.float64), rtol=0.01, atol=0)
    assert (trained(DeepSVDD(variance=0.0)) < 1e-3).all()  # as published, without a network that keeps it from that


def test_the_center_is_that_of_the_first_batch_and_not_zero() -> None:
    loss = DeepSVDD()
    loss.eval()(torch.randn(8, 4))
    assert loss.center is None
    loss.train()(torch.full((8, 3), 0.02) * torch.tensor([1.0, -1.0, 100.0]))
    assert loss.center.tolist() == pytest.approx([0.1, -0.1, 2.0])
    loss(torch.randn(8, 3) + 5)
    assert loss.center.tolist() == pytest.approx([0.1, -0.1, 2.0])
    given = DeepSVDD(center=torch.tensor([0.0, 1.0]), variance=0.0)
    assert given(torch.tensor([[0.0, 1.0], [3.0, 1.0]])).item() == 4.5
    assert given.center.tolist() == [0.0, 1.0]


def test_a_first_batch_that_is_not_finite_is_forgotten() -> None:
    for loss in (DeepSVDD(), DeepSVDD(momentum=0.9), DeepSVDD(soft_boundary=0.1)):
        rows = torch.randn(8, 3) + 5
        assert loss(rows.index_fill(0, torch.tensor([1]), torch.nan)).isnan()
        assert loss(rows).isfinite()
        assert all(state.isfinite().all() for state in remembered(loss).values() if state is not None)


def test_soft_boundary() -> None:
    loss = DeepSVDD(center=torch.tensor([1.0]), soft_boundary=0.25, variance=0.0)
    first, second = 1 + torch.tensor([[1.0], [2.0], [-3.0], [4.0], [5.0]]), 1 + torch.tensor([[4.0], [-6.0]])
    # a quarter is outside of radius 4: 16 + (25 - 16) / (5 / 4)
    assert loss(first).item() == pytest.approx(16 + 9 / 1.25)
    assert loss(second).item() == pytest.approx(16 + 20 / 0.5)  # with the radius of the batch before
    assert loss.radius.item() == pytest.approx(5.5)


@pytest.mark.parametrize(("rows", "dim", "mean"), [(64, 8, 7.875), (64, 32, 31.5)])
def test_the_own_covariance_reads_a_constant_and_a_stored_one_does_not(rows: int, dim: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, dim)
    for scale in (1.0, 20.0):
        some = scale * features @ torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        own = svdd_scores(some, some.mean(dim=0), some.T.cov() - 1e-4 * torch.eye(dim))  # without the ridge
        assert own.mean().item() == pytest.approx(mean, rel=1e-9)
    loss = DeepSVDD(momentum=0.9, variance=0.0)
    assert loss(features).item() == pytest.approx(mean, rel=1e-2)  # no batch before this one
    shrunk = features.mean(dim=0) + 0.1 * (features - features.mean(dim=0))
    assert loss(shrunk).item() == pytest.approx(0.01 * mean, rel=1e-2)
    expected = 0.9 * features.T.cov() + 0.1 * shrunk.T.cov()
    torch.testing.assert_close(loss.covariance, expected)


def test_mahalanobis_gradient() -> None:
    features = torch.randn(6, 3, dtype=torch.float64)
    center, covariance = features.mean(dim=0), features.T.cov()
    leaf = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: svdd_scores(x, center, covariance), leaf)
    inverse = torch.linalg.inv(covariance + 1e-4 * torch.eye(3))
    expected = torch.einsum("ni,ij,nj->n", leaf - center, inverse, leaf - center)
    torch.testing.assert_close(svdd_scores(leaf, center, covariance), expected)


def test_what_it_remembers_comes_back() -> None:
    loss, other = (DeepSVDD(momentum=0.9, soft_boundary=0.1) for _ in range(2))
    for _ in range(2):
        loss(torch.randn(16, 3))
    recall(other, remembered(loss))
    rows = torch.randn(16, 3)
    assert torch.equal(loss(rows), other(rows))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`center` must be finite numbers of shape \(D,\), not all 0, got shape"):
        DeepSVDD(center=torch.zeros(3))
    with pytest.raises(ValueError, match="`soft_boundary` must be between 0 and 1, got 1"):
        DeepSVDD(soft_boundary=1.0)
    with pytest.raises(ValueError, match="`momentum` must be at least 0 and below 1, got 1"):
        DeepSVDD(momentum=1.0)
    with pytest.raises(ValueError, match="`DeepSVDD` remembers 3 features, got 4"):
        DeepSVDD(center=torch.ones(3))(torch.randn(8, 4))
