"""Closed forms of CorInfoMax, and what it remembers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_collapse.losses import CorInfoMax, corinfomax, corinfomax_terms
from tests.contracts.test_losses import rank_after_training
from tests.losses.cases.base import whitened
from tests.losses.cases.corinfomax import naive_determinant


def batch(seed: int, n: int = 32, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_run_is_the_recursion_of_the_paper() -> None:
    loss = CorInfoMax()
    moments = [(np.zeros(5), np.eye(5)), (np.zeros(5), np.eye(5))]
    for step in range(4):
        a, b = 1 + batch(2 * step), 0.5 * batch(2 * step + 1)
        expected = 500 * ((a - b) ** 2).mean().item()
        for view, z in enumerate((a, b)):
            value, *moments[view] = naive_determinant(z.numpy(), *moments[view])
            expected += value
        assert loss(a, b).item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(loss.means.numpy(), [mean for mean, _ in moments], rtol=1e-10)
    np.testing.assert_allclose(loss.covariances.numpy(), [covariance for _, covariance in moments], rtol=1e-10)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_scale(scale: float) -> None:
    (z,) = whitened(1)
    assert CorInfoMax(forgetting=0.0, eps=1e-12)(scale * z, scale * z).item() == pytest.approx(
        -4 * math.log(scale), abs=1e-6
    )


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_dimensional_collapse(rank: int) -> None:
    """``d - rank`` dead dimensions read ``-2 (d - rank) / d log(eps)``."""
    (z,) = whitened(1)
    z = torch.cat([z[:, :rank], torch.zeros(16, 15 - rank)], dim=1)
    value = CorInfoMax(forgetting=0.0)(z, z).item()
    assert value == pytest.approx(-2 * (15 - rank) / 15 * math.log(1e-6), abs=1e-5)


def test_evaluation_neither_updates_nor_forgets() -> None:
    loss = CorInfoMax(forgetting=0.9)
    loss(batch(0), batch(1))
    means, covariances = loss.means.clone(), loss.covariances.clone()
    loss.eval()
    assert loss(batch(2), batch(3)).item() == loss(batch(2), batch(3)).item()
    assert torch.equal(loss.means, means)
    assert torch.equal(loss.covariances, covariances)
    fresh = CorInfoMax().eval()
    fresh(batch(2), batch(3))
    assert fresh.means is fresh.covariances is None


def test_what_it_remembers() -> None:
    loss, once = CorInfoMax(forgetting=0.5), CorInfoMax(forgetting=0.5)(batch(0), batch(1)).item()
    assert loss(batch(0), batch(1)).item() == once
    assert not loss.means.requires_grad
    assert not loss.covariances.requires_grad
    assert not loss.state_dict()
    assert dict(loss.named_buffers()).keys() == {"means", "covariances"}
    twin = copy.deepcopy(loss)
    assert twin(batch(2), batch(3)).item() == loss(batch(2), batch(3)).item() != once
    with pytest.raises(ValueError, match=r"remembers 5 features, got 3\. Use one loss per layer, or call `reset\(\)`"):
        loss(batch(0, d=3), batch(1, d=3))
    loss.reset()
    loss(batch(0, d=3), batch(1, d=3))
    loss.reset()
    assert loss(batch(0), batch(1)).item() == once


def test_too_few_rows_leave_it_as_it_was() -> None:
    loss = CorInfoMax()
    with pytest.raises(ValueError, match="at least 2 rows over all processes, got 1"):
        loss(batch(0, 1), batch(1, 1))
    assert loss.means is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 512.0])
def test_finite_in_any_precision_while_it_collapses(dtype: torch.dtype, scale: float) -> None:
    loss = CorInfoMax()
    z = (scale * batch(0, 4, 64)).to(dtype).requires_grad_()  # of rank 3 at most
    for _ in range(5):
        (grad,) = torch.autograd.grad(loss(z, z), z)
        assert grad.isfinite().all()


def test_moves_to_a_device_without_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = CorInfoMax()
    loss(batch(0), batch(1))
    kept = loss.to("cpu").covariances
    assert kept.dtype == torch.float64
    single = {"cpu": torch.float64, "meta": torch.float32}
    monkeypatch.setattr(corinfomax, "accumulation_dtype", lambda device: single[device.type])
    moved: list[torch.dtype] = []
    loss._apply(lambda tensor: moved.append(tensor.dtype) or tensor.to("meta"))
    assert set(moved) == {torch.float32}  # what the device would have refused
    assert loss.means.dtype == loss.covariances.dtype == torch.float32


def test_gradient_runs_through_this_batch_alone() -> None:
    a, b = batch(0).requires_grad_(), batch(1)
    terms, moments = corinfomax_terms(a, b, torch.zeros(2, 5), torch.eye(5).repeat(2, 1, 1))
    again, _ = corinfomax_terms(a, b, *moments)
    (first,) = torch.autograd.grad(terms["determinant"], a)
    (second,) = torch.autograd.grad(again["determinant"], a)  # the first graph is gone
    assert not torch.equal(first, second)


def test_the_toy_does_not_collapse_with_less_invariance() -> None:
    assert rank_after_training(CorInfoMax(invariance=1.0), 1.0) > 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_leaves_the_memory_as_it_was(bad: float) -> None:
    """Its own value tells of it, the next one is that of a loss that has not seen it; the first batch, or a later."""
    torch.manual_seed(0)
    good, poison = torch.randn(3, 2, 16, 4).double(), torch.randn(2, 16, 4).double()
    poison[0, 3, 1] = bad
    loss, spared = CorInfoMax(forgetting=0.5), CorInfoMax(forgetting=0.5)
    for views in good:
        assert not loss(*poison).isfinite()
        assert torch.equal(loss(*views), spared(*views))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        CorInfoMax(eps=0)
    for forgetting in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"`forgetting` must be at least 0 and less than 1, got {forgetting}"):
            CorInfoMax(forgetting=forgetting)
    assert "invariance=500.0, forgetting=0.01, eps=1e-06" in repr(CorInfoMax())
