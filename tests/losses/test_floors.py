"""The hinge on effective rank and the barrier of the log-determinant: closed forms, jitter, streams."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.functional import effective_rank
from lightning_collapse.losses import (
    EffectiveRankHinge,
    LogDetBarrier,
    VICReg,
    effective_rank_terms,
    log_det_barrier,
)
from lightning_collapse.losses.support.jitter import JitteredCovarianceLoss, pattern
from lightning_collapse.spectral import singular_values
from tests.losses.cases.base import correlated, whitened

both = pytest.mark.parametrize("make", [EffectiveRankHinge, LogDetBarrier])
Make = Callable[..., JitteredCovarianceLoss]


def gradient(loss: nn.Module, features: Tensor) -> Tensor:
    features = features.clone().requires_grad_()
    loss(features).backward()
    assert features.grad is not None
    return features.grad


def with_spectrum(*eigenvalues: float) -> Tensor:
    """Rows whose covariance is diagonal, with these eigenvalues."""
    return whitened(1)[0][:, : len(eigenvalues)] * (torch.tensor(eigenvalues, dtype=torch.float64) * 15 / 16).sqrt()


def test_closed_forms_of_the_barrier() -> None:
    loss = LogDetBarrier(jitter=0)
    for variance in (1e-3, 0.25, 1.0, 9.0):
        mu = (variance + 1e-4) / (1 + 1e-4)
        expected = mu - 1 - math.log(mu)
        assert loss(with_spectrum(*[variance] * 5)).item() == pytest.approx(expected, abs=1e-12)
        scaled = LogDetBarrier(target_std=3.0, jitter=0)(3 * with_spectrum(*[variance] * 5))
        assert scaled.item() == pytest.approx(expected, abs=1e-12)
    # a direction without variance costs its share of the value at collapse
    dead = loss(with_spectrum(1, 1, 1, 0)).item()
    assert dead == pytest.approx(loss.value_at_collapse / 4)
    few = torch.randn(5, 40, dtype=torch.float64)
    assert loss(few).item() >= (1 - 4 / 40) * loss.value_at_collapse


def test_closed_forms_of_the_hinge() -> None:
    isotropic = 4 * 15 / (4 + 15)
    terms = effective_rank_terms(with_spectrum(1, 0, 0, 0), jitter=0)
    assert terms["rank"].item() == pytest.approx(1 - 1 / (0.5 * isotropic))
    assert terms["spread"].item() == pytest.approx(0.5)
    terms = effective_rank_terms(with_spectrum(4, 4, 0, 0), target=1.0, jitter=0)
    assert terms["rank"].item() == pytest.approx(1 - 2 / isotropic)
    assert terms["spread"].item() == 0
    assert EffectiveRankHinge(jitter=0)(with_spectrum(1, 1, 1, 1)).item() == pytest.approx(0, abs=1e-12)
    # half of the rank is gone where the standard deviation is a thousandth of the target
    faint = effective_rank_terms(1e-3 * with_spectrum(1, 1, 1, 1), target=1.0, jitter=0)
    assert faint["rank"].item() == pytest.approx(1 - 2 / isotropic)
    assert EffectiveRankHinge(3.0, 5.0, target_std=2.0).value_at_collapse == 13.0


@both
def test_near_and_exact_collapse_are_repelled(make: Make) -> None:
    """At a deviation of 1e-4 the gradient of VICReg's variance has faded a hundredfold, at 0 it is zero."""
    rows = whitened(1)[0][:, :4].float()
    vicreg = VICReg(invariance=0, covariance=0)
    full, faded = (gradient(lambda z: vicreg(z, z), s * rows).norm() for s in (0.5, 1e-4))  # type: ignore[arg-type]
    assert faded < 0.02 * full
    for scale in (1e-3, 1e-4):
        grad = gradient(make(), scale * rows)
        assert (grad * rows).sum() < 0  # a step against it spreads the rows
        assert grad.norm() > 0.3 * gradient(make(), 0.5 * rows).norm()
    constant = torch.full((16, 4), 3.0)
    assert (gradient(lambda z: vicreg(z, z), constant) == 0).all()  # type: ignore[arg-type]
    assert (gradient(make(jitter=0), constant) == 0).all()
    grad = gradient(make(), constant)
    assert (grad.norm(dim=1) > 1e-3).all()
    assert torch.linalg.matrix_rank(grad) == 4
    assert torch.equal(grad, gradient(make(), constant))  # no random number


@both
@pytest.mark.parametrize("jitter", [1e-5, 0.0])
def test_a_dead_encoder_comes_back(make: Make, jitter: float) -> None:
    """All outputs equal: with jitter they spread to the target in all directions, without it they never move."""
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    encoder = nn.Linear(16, 8)
    nn.init.zeros_(encoder.weight)
    nn.init.constant_(encoder.bias, 3.0)
    loss, optimizer = make(jitter=jitter), torch.optim.SGD(encoder.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss(encoder(rows)).backward()
        optimizer.step()
    features = encoder(rows).detach()
    if jitter:
        assert features.std(dim=0).mean() > 0.5
        assert effective_rank(singular_values(features)) > 4
    else:
        assert features.std() == 0


@both
def test_jitter_hardly_changes_a_healthy_value(make: Make) -> None:
    (features,) = correlated((64, 8), 1)
    assert make()(features).item() == pytest.approx(make(jitter=0)(features).item(), rel=1e-4)


@both
def test_gradient_is_finite_at_any_scale(make: Make) -> None:
    for scale in (0.0, 1e-30, 1e-6, 1.0, 1e6):
        for shape in ((2, 6), (6, 2), (40, 6)):
            features = scale * torch.randn(shape)
            assert gradient(make(), features).isfinite().all()
            assert make()(features).isfinite()


def test_pattern() -> None:
    device = torch.device("cpu")
    for n, d in ((8, 4), (6, 10), (64, 64), (256, 32)):
        rows = pattern(0, n, d, device)
        spectrum = torch.linalg.svdvals(rows - rows.mean(dim=0))[: min(n - 1, d)]
        assert spectrum[-1] > 0.02 * spectrum[0]
    torch.testing.assert_close(pattern(torch.tensor(5.0), 3, 4, device), pattern(0, 8, 4, device)[5:])
    assert pattern(0, 1000, 64, device).var(dim=0).mean().item() == pytest.approx(1, abs=0.05)


@both
def test_stream(make: Make) -> None:
    first, second, third = torch.randn(3, 20, 6, dtype=torch.float64)
    loss = make(jitter=0, momentum=0.75)
    assert loss(first).item() == pytest.approx(_value(loss, torch.cov(first.T)))
    blended = 0.75 * torch.cov(first.T) + 0.25 * torch.cov(second.T)
    with torch.no_grad():  # looked at, not learnt from: the stream stays
        assert loss(second).item() == pytest.approx(_value(loss, blended))
    assert loss(second).item() == pytest.approx(_value(loss, blended))
    blended = 0.75 * blended + 0.25 * torch.cov(third.T)
    leaf = third.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert value.item() == pytest.approx(_value(loss, blended))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert not loss.state_dict()
    with pytest.raises(ValueError, match=r"keep its width with `momentum`, got 4 after 6. Use a loss of its own"):
        loss(third[:, :4])


def _value(loss: JitteredCovarianceLoss, covariance: Tensor) -> float:
    """The loss of rows with this covariance and as many samples as the stream has at momentum 0.75."""
    eigenvalues = torch.linalg.eigvalsh(covariance)
    if isinstance(loss, LogDetBarrier):
        mu = (eigenvalues + 1e-4) / (1 + 1e-4)
        return (mu - 1 - mu.log()).mean().item()
    d, freedom = len(covariance), 19 * 1.75 / 0.25
    rank = eigenvalues.sum() ** 2 / (eigenvalues.square().sum() + d * 1e-12)
    hinge = torch.relu(1 - rank / (0.5 * d * freedom / (d + freedom)))
    return (hinge + torch.relu(1 - eigenvalues.mean().sqrt())).item()


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_std": 0}, "`target_std` must be positive, got 0"),
        ({"jitter": -1}, "`jitter` must not be negative, got -1. With 0 equal rows"),
        ({"momentum": 1.0}, "`momentum` must be at least 0 and below 1, got 1.0. 0 takes"),
    ],
)
def test_bad_arguments(make: Make, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_bad_targets() -> None:
    with pytest.raises(ValueError, match="`target` is a share of the rank of isotropic features and at most 1, got 2"):
        EffectiveRankHinge(target=2)
    with pytest.raises(ValueError, match="`target` must be positive, got 0"):
        EffectiveRankHinge(target=0)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        LogDetBarrier(eps=0)


def test_functions_are_the_modules() -> None:
    (features,) = correlated((12, 5), 1)
    assert torch.equal(log_det_barrier(features), LogDetBarrier()(features))
    terms = effective_rank_terms(features)
    for name, value in EffectiveRankHinge().terms(features).items():
        assert torch.equal(value, terms[name])


@pytest.mark.parametrize("loss", [EffectiveRankHinge, LogDetBarrier])
def test_the_stream_outlives_a_batch_that_is_not_finite(loss: type[nn.Module]) -> None:
    good, bad = torch.randn(2, 16, 4), torch.full((16, 4), torch.nan)
    whole, hit = loss(momentum=0.9), loss(momentum=0.9)
    for batch in (bad, good[0], bad):
        hit(batch)
    whole(good[0])
    assert hit(good[1]) == whole(good[1])
