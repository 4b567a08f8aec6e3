"""Labels that a step mixes show in its loss, and those that it does not mix do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_collapse.monitoring.loss_targets import LossTargets

N, C = 24, 5
Y = torch.randint(C, (N,), generator=torch.Generator().manual_seed(0))
OTHER = Y.roll(1)
SOFT = 0.7 * F.one_hot(Y, C).float() + 0.3 * F.one_hot(OTHER, C).float()
FEW = 0.3 * F.one_hot(Y, C).float() + 0.7 * F.one_hot(OTHER, C).float()
ONE_HOT = F.one_hot(Y, C).float()
SMOOTH = 0.9 * ONE_HOT + 0.1 / C
TEACHER = torch.randn(N, C, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
PADDED = torch.where(torch.arange(N) % 3 == 0, -100, Y)


def by_hand(z, targets):
    return -(targets * z.log_softmax(dim=-1)).sum(dim=-1).mean()


CLEAN = {
    "classes": lambda z: F.cross_entropy(z, Y),
    "smoothing": lambda z: F.cross_entropy(z, Y, label_smoothing=0.1),
    "the same twice": lambda z: F.cross_entropy(z, Y) + F.multi_margin_loss(z, Y),
    "padding": lambda z: nn.CrossEntropyLoss()(z, PADDED),
    "one-hot": lambda z: F.mse_loss(z, ONE_HOT),
    "smoothed by hand": lambda z: by_hand(z, SMOOTH),
    "a teacher": lambda z: F.kl_div(z.log_softmax(dim=1), TEACHER, reduction="batchmean"),
    "a teacher beside": lambda z: F.cross_entropy(z, Y) + F.kl_div(z.log_softmax(dim=1), FEW, reduction="batchmean"),
    "a gather": lambda z: -z.log_softmax(dim=1).gather(1, Y.unsqueeze(1)).mean(),
    "an index": lambda z: -z.log_softmax(dim=1)[torch.arange(N), Y].mean(),
}
MIXED = {
    "two label sets": lambda z: 0.7 * F.cross_entropy(z, Y) + 0.3 * F.cross_entropy(z, OTHER),
    "a permutation": lambda z: F.cross_entropy(z, OTHER),
    "soft": lambda z: F.cross_entropy(z, SOFT),
    "mostly the other": lambda z: nn.CrossEntropyLoss()(z, FEW),
    "yes or no": lambda z: F.binary_cross_entropy_with_logits(z, SOFT),
    "by hand": lambda z: by_hand(z, SOFT),
    "divergence": lambda z: F.kl_div(z.log_softmax(dim=1), SOFT, reduction="batchmean"),
    "two gathers": lambda z: sum(-z.log_softmax(1).gather(1, y.unsqueeze(1)).mean() for y in (Y, OTHER)),
}


def told(loss, other_head=None):
    head, body = nn.Linear(3, C), torch.randn(N, 3)
    failed = []
    targets = LossTargets(lambda: head.weight, failed.append)
    targets.armed = True
    total = loss(head(body))
    if other_head is not None:
        total = total + F.cross_entropy(other_head(body), OTHER)
    targets.armed = False
    total.backward()
    targets.note(torch.exp, (total,), {}, total)
    assert not failed
    found = targets.agree(Y, C)
    return None if found is None else bool(found)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_labels(name):
    assert told(CLEAN[name])


@pytest.mark.parametrize("name", MIXED)
def test_mixed_labels(name):
    assert told(MIXED[name]) is False


def test_what_another_head_is_compared_with_does_not_count():
    assert told(CLEAN["classes"], nn.Linear(3, C))


def test_two_classes_that_are_mixed_are_not_smoothed():
    y, other = Y % 2, OTHER % 2
    head = nn.Linear(3, 2)
    for mixed, expected in (
        (0.6 * F.one_hot(y, 2) + 0.4 * F.one_hot(other, 2), False),
        (0.8 * F.one_hot(y, 2) + 0.1, True),
    ):
        targets = LossTargets(lambda: head.weight, print)
        targets.armed = True
        F.cross_entropy(head(torch.randn(N, 3)), mixed.float())
        targets.armed = False
        assert bool(targets.agree(y, 2)) is expected


def test_nothing_is_known_of_a_loss_of_its_own():
    assert told(lambda z: z.square().mean()) is None
