"""Samples that contribute and losses by frequency, against sums over samples written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_collapse.functional.tail_learning import contributing_samples, loss_by_frequency
from lightning_collapse.metrics import ClassLoss, ContributingSamples

F64 = torch.float64


def logits(seed: int, n: int, classes: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(seed: int, n: int, classes: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.5, 5.0, 40.0])
def test_contributing_samples_are_those_of_the_sums(scale: float) -> None:
    z, y = logits(0, 1000, 5, scale), labels(1, 1000, 5)
    g = 1 - z.softmax(dim=1).gather(1, y.unsqueeze(1)).squeeze(1)
    found = contributing_samples(z, y)
    effective = g.sum().square() / g.square().sum() / 1000
    assert found["effective_fraction"].item() == pytest.approx(effective.item(), rel=1e-9)
    top = g.sort(descending=True).values[:100].sum() / g.sum()
    assert found["top_tenth"].item() == pytest.approx(top.item(), rel=0.02)
    streamed = ContributingSamples()
    for part in torch.arange(1000).split(300):
        streamed.update(z[part], y[part])
    streamed.update(z[:3], torch.tensor([-100, 5, -1]))
    assert {k: v.item() for k, v in streamed.compute().items()} == pytest.approx(
        {k: v.item() for k, v in found.items()}
    )


def test_gaussian_margins_read_what_is_published_beside_them() -> None:
    published = {0.0: (0.77, 0.19), 2.0: (0.50, 0.33), 5.0: (0.20, 0.54)}
    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(2), dtype=F64)
    for mean, (effective, top) in published.items():
        margin = mean + 1.5 * noise
        found = contributing_samples(
            torch.stack([margin, torch.zeros_like(margin)], dim=1), torch.zeros(200_000).long()
        )
        assert found["effective_fraction"].item() == pytest.approx(effective, abs=0.01)
        assert found["top_tenth"].item() == pytest.approx(top, abs=0.015)


def test_samples_that_are_all_but_learned_still_count_in_single_precision() -> None:
    z = torch.tensor([[0.0, -30.0], [0.0, -30.0], [0.0, -31.0]])  # 1 - p is 0 in `float32`
    g = torch.tensor([-30.0, -30.0, -31.0], dtype=F64).exp()
    found = contributing_samples(z, torch.zeros(3).long())["effective_fraction"]
    assert found.item() == pytest.approx((g.sum().square() / g.square().sum() / 3).item(), rel=1e-6)


def test_class_loss_is_the_mean_of_each_class_and_bin() -> None:
    z, y = logits(3, 400, 6), labels(4, 400, 5)  # the last class is never seen
    losses = cross_entropy(z, y, reduction="none")
    frequencies = torch.tensor([1000, 101, 100, 20, 19, 3])
    metric = ClassLoss(6, frequencies)
    for part in torch.arange(400).split(130):
        metric.update(losses[part], y[part])
    metric.update(torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor([0, -100, 6]))
    means = [losses[y == c].mean().item() for c in range(5)]
    expected = {
        "loss": losses.mean().item(),
        "macro": sum(means) / 5,
        "few": means[4],
        "medium": (means[2] + means[3]) / 2,
        "many": (means[0] + means[1]) / 2,
    }
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-12)


def test_loss_by_token_frequency() -> None:
    tokens = torch.cat([torch.zeros(200), torch.ones(30), torch.tensor([2.0] * 5 + [3.0] * 4)]).long()
    losses = 1.0 / (1 + tokens.double())
    metric = ClassLoss(10, edges=(10, 100), per_class=False)  # by what was seen here
    metric.update(losses.view(1, -1), tokens.view(1, -1))
    found = metric.compute()
    assert found["below_10"].item() == pytest.approx((5 / 3 + 1) / 9)
    assert (found["from_10"], found["from_100"]) == (0.5, 1.0)
    _, classes = loss_by_frequency(torch.ones(4), torch.ones(4), torch.tensor([9, 10, 99, 100]), edges=(10, 100))
    assert classes.tolist() == [1, 2, 1]


def test_half_precision_and_autocast() -> None:
    z, y = logits(5, 50, 4).bfloat16(), labels(6, 50, 4)
    exact = contributing_samples(z.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contributing_samples(z, y)
        metric = ClassLoss(4)
        metric.update(cross_entropy(z.float(), y, reduction="none").bfloat16(), y)
    assert found == exact
    assert math.isfinite(metric.compute()["loss"])


def test_bad_arguments() -> None:
    for wrong in (torch.zeros(3), torch.zeros(2).long()):
        with pytest.raises(ValueError, match="`labels` must be integers of shape"):
            contributing_samples(torch.zeros(3, 2), wrong)
        with pytest.raises(ValueError, match="`labels` must be integers of the shape of `losses`"):
            ClassLoss(2).update(torch.zeros(3), wrong)
    with pytest.raises(ValueError, match="`frequencies` must all have shape"):
        ClassLoss(3, frequencies=torch.ones(2))
    with pytest.raises(ValueError, match="`edges` must ascend"):
        ClassLoss(3, edges=(10, 5))
