"""Against a loop in float64, its limits, gradients far out, autocast, and bad input."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from lightning_collapse.losses import FocalPreference, TooFewRowsError, focal_preference_loss
from tests.losses.test_no_wait import NoWait


def pairs(rows=7, scale=20.0, dtype=torch.float64):
    numbers = scale * torch.randn(4, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [row.to(dtype).requires_grad_() for row in numbers]


def naive(chosen, rejected, reference_chosen, reference_rejected, beta=0.1, gamma=2.0):
    total = 0.0
    for c, r, rc, rr in zip(chosen, rejected, reference_chosen, reference_rejected, strict=True):
        p = 1 / (1 + math.exp(-beta * (c - r - rc + rr)))
        total -= (1 - p) ** gamma * math.log(p)
    return total / len(chosen)


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 2.0), (0.5, 1.0), (0.1, 0.0)])
def test_value_and_gradient(beta, gamma):
    given = pairs()
    loss = FocalPreference(beta, gamma)(*given)
    assert loss.item() == pytest.approx(naive(*(row.tolist() for row in given), beta, gamma))
    loss.backward()
    assert given[2].grad is None
    assert given[3].grad is None  # the reference
    assert torch.equal(given[0].grad, -given[1].grad)
    references = given[2].detach(), given[3].detach()
    assert torch.autograd.gradcheck(lambda c, r: focal_preference_loss(c, r, *references, beta, gamma), given[:2])


def test_without_focus_it_is_direct_preference_optimization():
    chosen, rejected, reference_chosen, reference_rejected = pairs()
    logits = 0.1 * ((chosen - rejected) - (reference_chosen - reference_rejected))
    dpo = -logsigmoid(logits).mean()
    torch.testing.assert_close(
        focal_preference_loss(chosen, rejected, reference_chosen, reference_rejected, gamma=0.0), dpo
    )


def test_pairs_far_out_have_finite_gradients_and_no_weight_once_told_apart():
    zero = torch.zeros(2)
    chosen = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = focal_preference_loss(chosen, zero, zero, zero)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert loss.item() == pytest.approx(1e5 / 2)
    torch.testing.assert_close(gradient, torch.tensor([-0.05, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_full(dtype):
    given = pairs(scale=4.0, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = FocalPreference()(*given)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive(*(row.tolist() for row in given)), rel=1e-5)


def test_it_does_not_wait_for_the_device():
    given = pairs()
    with NoWait():
        FocalPreference()(*given).backward()


def test_bad_input_is_named():
    rows = torch.zeros(3)
    with pytest.raises(ValueError, match=r"got `rejected` of shape \(3, 2\)"):
        focal_preference_loss(rows, torch.zeros(3, 2), rows, rows)
    with pytest.raises(ValueError, match=r"`reference_rejected` of shape \(3,\) and torch.int64"):
        focal_preference_loss(rows, rows, rows, rows.long())
    with pytest.raises(TooFewRowsError, match="needs at least 1 row"):
        focal_preference_loss(*[torch.zeros(0)] * 4)
    with pytest.raises(ValueError, match="`beta` must be positive"):
        FocalPreference(beta=0.0)
    with pytest.raises(ValueError, match="`gamma` must not be negative"):
        FocalPreference(gamma=-1.0)
