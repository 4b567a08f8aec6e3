"""Losses of pairs: closed forms at collapse and at rest, and what classes and subclasses do under them."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.losses import (
    BatchHardTriplet,
    ConR,
    InfoNCE,
    SpreadLoss,
    SupCon,
    batch_hard_triplet,
    conr_loss,
    info_nce_loss,
    midpoint_mixup,
    mixup_cross_entropy,
    spread_terms,
    sup_con_terms,
)
from lightning_collapse.losses.support.contrast import masked_logsumexp

SIZES = [2, 3, 4]
LABELS = torch.arange(3).repeat_interleave(torch.tensor(SIZES))


def corners(scale: float = 1.0) -> Tensor:
    """Every row on the point of its class, at right angles to the others."""
    return scale * torch.eye(3, dtype=torch.float64)[LABELS]


def gradient(loss: nn.Module, *views: Tensor, labels: Tensor = LABELS) -> Tensor:
    leaves = [view.clone().requires_grad_() for view in views]
    loss(*leaves, labels).backward()
    return torch.stack([leaf.grad for leaf in leaves])


def test_complete_collapse() -> None:
    same = torch.ones(9, 3, dtype=torch.float64)
    assert info_nce_loss(same, same).item() == pytest.approx(math.log(17))
    for loss in (SupCon(), SupCon(0.5, 0.25, "in"), InfoNCE()):
        labels = () if isinstance(loss, InfoNCE) else (LABELS,)
        assert loss(same, same, *labels).item() == pytest.approx(loss.at_collapse(9, 3)) == pytest.approx(math.log(17))
    for margin, expected in ((0.2, 0.2), (None, math.log(2))):
        loss = BatchHardTriplet(margin)
        assert loss(same, LABELS).item() == pytest.approx(expected) == pytest.approx(loss.value_at_collapse)
        assert loss.terms(same, LABELS)["above_collapse"].item() == pytest.approx(0.0, abs=1e-12)


def test_class_collapse() -> None:
    mean_of_logs = sum(n * math.log(n) for n in SIZES) / 9
    rows = corners(10.0)
    terms = spread_terms(rows, rows, LABELS)
    assert terms["spread"].item() == pytest.approx(mean_of_logs)
    assert terms["attract"].item() == pytest.approx(0.0, abs=1e-9)
    terms = sup_con_terms(rows, rows, LABELS, temperature=0.01)
    expected = sum(n * math.log(2 * n - 1) for n in SIZES) / 9
    assert terms["supervised"].item() == pytest.approx(expected) == pytest.approx(terms["self_supervised"].item())


@pytest.mark.parametrize("loss", [SpreadLoss(attract=0.0), SupCon(beta=0.9)])
def test_what_keeps_subclasses_is_lower_where_they_are_apart(loss: nn.Module) -> None:
    apart = corners() + 0.5 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert loss(apart, apart, LABELS) < loss(corners(), corners(), LABELS)
    assert SupCon()(apart, apart, LABELS) > SupCon()(corners(), corners(), LABELS)


def test_triplet_near_and_at_collapse() -> None:
    """The slope of a distance does not depend on the scale, and is 0 at exact collapse."""
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = torch.ones(9, 4, dtype=torch.float64)
    for spread in (1e-2, 1e-6):
        assert gradient(BatchHardTriplet(5.0), base + spread * rows).norm() > 0.2
    assert (gradient(BatchHardTriplet(5.0), base) == 0).all()
    random = batch_hard_triplet(nn.functional.normalize(rows), LABELS, 0.2)
    assert random > 0.2  # collapse is downhill
    single = batch_hard_triplet((1000 + 1e-1 * rows).float(), LABELS, 5.0)
    exact = batch_hard_triplet((1000 + 1e-1 * rows).float().double(), LABELS, 5.0)
    assert single.item() == pytest.approx(exact.item(), rel=1e-6)
    alone = rows[:3].requires_grad_()
    batch_hard_triplet(alone, torch.tensor([0, 1, -100])).backward()  # nobody has a triplet
    assert (alone.grad == 0).all()


def test_conr_without_positives_or_negatives_is_zero_and_finite() -> None:
    views = torch.randn(2, 4, 3, dtype=torch.float64)
    spread, equal = torch.tensor([0.0, 5.0, 10.0, 15.0]), torch.zeros(4)
    for targets, guesses in ((spread, 100 * torch.arange(8.0).view(2, 4)), (equal, torch.zeros(2, 4))):
        assert conr_loss(*views, targets, guesses).item() == 0
        assert (gradient(ConR(lambda z: 100 * torch.arange(len(z))), *views, labels=targets) == 0).all()
    # one more positive in the set, with the rest far below: the value is that of a softmax, with no e^0 for the others
    near = conr_loss(*torch.ones(2, 2, 3), torch.tensor([0.0, 9.0]), torch.zeros(2, 2), temperature=5.0)
    assert near.item() == pytest.approx(math.log(1 + 2 * math.exp(0.09)))
    # and a weight counts once: inside of the denominator
    weights = torch.full((2,), 3.0)
    heavy = conr_loss(*torch.ones(2, 2, 3), torch.tensor([0.0, 9.0]), torch.zeros(2, 2), weights)
    assert heavy.item() == pytest.approx(math.log(1 + 6 * math.exp(0.09)), rel=1e-5)


def test_conr_calls_a_head_without_gradient_hooks_or_ownership() -> None:
    head, called = nn.Linear(3, 1), []
    head.register_forward_hook(lambda *args: called.append(1))
    loss = ConR(head)
    gradient(loss, *torch.randn(2, 4, 3), labels=torch.arange(4.0))
    assert not called
    assert head.weight.grad is None
    assert not list(loss.parameters())
    with pytest.raises(ValueError, match=r"`predictions` of `conr_loss` must have shape \(2, 4\).*got \(2, 8\)"):
        ConR(nn.Linear(3, 2))(*torch.randn(2, 4, 3), torch.arange(4.0))


def test_conr_leaves_rows_of_impossible_weights_out_and_says_what_its_functions_must_return() -> None:
    views, targets = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([0.0, 1.0, 9.0, 0.0, 9.0])
    for bad in (-1.0, 0.0, math.nan, math.inf):
        loss = ConR(lambda z: z[:, 0], density_weight=lambda y, bad=bad: torch.where(torch.arange(5) < 3, 2.0, bad))
        kept = ConR(lambda z: z[:, 0], density_weight=lambda y: torch.full((3,), 2.0))(*views[:, :3], targets[:3])
        assert loss(*views, targets).item() == pytest.approx(kept.item(), rel=1e-12)
        assert gradient(loss, *views, labels=targets).isfinite().all()
    with pytest.raises(ValueError, match=r"`weights` of `conr_loss` must have shape \(5,\), one per row, got \(2,\)"):
        ConR(lambda z: z[:, 0], density_weight=lambda y: y[:2])(*views, targets)
    with pytest.raises(ValueError, match=r"`predict` of `ConR` must return a tensor.*, got array"):
        ConR(lambda z: z[:, 0].numpy())(*views, targets)
    with pytest.raises(ValueError, match="`density_weight` must be a function of the targets, or None, got 3"):
        ConR(torch.sum, density_weight=3)


def test_a_row_without_a_label_may_hold_anything() -> None:
    labels = torch.tensor([0, 0, 1, 1, -1])
    rows = torch.randn(5, 3, dtype=torch.float64)
    broken = rows.index_fill(0, torch.tensor([4]), torch.nan)
    for loss, n in ((SupCon(), 2), (SpreadLoss(), 2), (BatchHardTriplet(), 1)):
        assert torch.equal(loss(*[broken] * n, labels), loss(*[rows] * n, labels))
        assert gradient(loss, *[broken] * n, labels=labels).isfinite().all()


def test_masked_sum_of_nothing() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    value = masked_logsumexp(logits, torch.tensor([[True, True, False], [False, False, False]]))
    assert value.tolist() == [pytest.approx(math.log(2)), -math.inf]
    value[0].backward()
    assert logits.grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


def test_midpoint_mixup() -> None:
    inputs, labels = torch.randn(32, 2, 3), torch.arange(32) % 4
    mixed, own, partners = midpoint_mixup(inputs, labels, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, (inputs + inputs[order]) / 2)
    assert torch.equal(own, labels)
    assert torch.equal(partners, labels[order])
    quarter, _, _ = midpoint_mixup(inputs, labels, lam=0.25, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quarter, 0.25 * inputs + 0.75 * inputs[order])


def test_mixup_cross_entropy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels, partners = torch.tensor([0, 1, 2, 3, -100, 1]), torch.tensor([1, 1, 0, 2, 0, -100])
    value = mixup_cross_entropy(logits, labels, partners)
    soft = (nn.functional.one_hot(labels[:4], 4) + nn.functional.one_hot(partners[:4], 4)) / 2
    torch.testing.assert_close(value, -(soft * logits[:4].log_softmax(1)).sum(1).mean())
    assert torch.autograd.gradcheck(lambda z: mixup_cross_entropy(z, labels, partners, 0.3), [logits])
    # the floor of pairs of different classes
    perfect = torch.full((1, 4), -1e4).index_fill(1, torch.tensor([0, 2]), 0.0)
    assert mixup_cross_entropy(perfect, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx(math.log(2))
    assert mixup_cross_entropy(logits.half(), labels, partners).dtype == torch.float32


def test_bad_arguments() -> None:
    for loss in (InfoNCE, SupCon, SpreadLoss):
        with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
            loss(temperature=0)
    with pytest.raises(ValueError, match=r"`beta` must be between 0 and 1, got 1\.5"):
        SupCon(beta=1.5)
    with pytest.raises(ValueError, match=r"`form` must be one of \('out', 'in'\), got 'x'"):
        SupCon(form="x")
    with pytest.raises(ValueError, match="must not both be 0"):
        SpreadLoss(attract=0, spread=0)
    with pytest.raises(ValueError, match="`margin` must be positive, got 0"):
        BatchHardTriplet(0)
    with pytest.raises(ValueError, match="`predict` must be a function or the head of the model, got 3"):
        ConR(3)
    with pytest.raises(ValueError, match="`lam` must be between 0 and 1, got 2"):
        midpoint_mixup(torch.zeros(2, 1), torch.zeros(2), lam=2)
    with pytest.raises(ValueError, match=r"must be floating point of shape \(N, ...\), and `labels` \(N,\), got"):
        midpoint_mixup(torch.zeros(2, 1), torch.zeros(3))
