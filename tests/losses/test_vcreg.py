"""Closed forms of VCReg."""

import pytest
import torch

from lightning_collapse.losses import VCReg, vcreg_terms, vicreg_terms
from tests.losses.cases.base import correlated, whitened
from tests.losses.cases.vcreg import naive_vcreg


def test_whitened_features_read_nothing() -> None:
    assert VCReg()(*whitened(1)).item() == 0
    assert VCReg().value_at_collapse == pytest.approx(0.16 * (1 - 1e-5**0.5))


def test_terms_are_vicregs_but_for_the_mean_over_pairs() -> None:
    (features,) = correlated((40, 6), 1)
    mine, theirs = vcreg_terms(features, eps=1e-4), vicreg_terms(features, features)
    assert mine["variance"].item() == pytest.approx(theirs["variance"].item())
    assert mine["covariance"].item() == pytest.approx(theirs["covariance"].item() / 2 / 5)


@pytest.mark.parametrize("shape", [(6, 10), (40, 6)])
def test_outliers_count_linearly(shape: tuple[int, int]) -> None:
    features = (4 * correlated(shape, 1)[0]).requires_grad_()
    delta = 2.0
    loss = VCReg(delta=delta)
    covariance = torch.cov(features.T).abs()
    assert (covariance > delta).any()
    assert (covariance < delta).any()
    assert loss(features).item() == pytest.approx(naive_vcreg(features.detach().numpy(), delta))
    assert torch.autograd.gradcheck(loss, (features,))
    assert VCReg(delta=1e6)(features).item() == pytest.approx(VCReg()(features).item())


def test_one_feature_has_no_pairs() -> None:
    for delta in (None, 1.0):
        terms = vcreg_terms(torch.randn(9, 1), delta=delta)
        assert terms["covariance"].item() == 0


def test_arguments() -> None:
    assert repr(VCReg()) == "VCReg(variance=0.16, covariance=0.01, target_std=1.0, eps=1e-05, delta=None)"
    for argument in ("target_std", "eps", "delta"):
        with pytest.raises(ValueError, match=f"`{argument}` must be positive, got 0"):
            VCReg(**{argument: 0})
