"""Regularizers that take labels, through the mixin in real fits."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse import AntiCollapseMixin, Regularizer
from lightning_collapse.layers import ETFClassifier, FedETFHead
from lightning_collapse.losses import (
    BalancedSoftmax,
    DotRegression,
    LongTailCollapse,
    MaxSup,
    SpectralDecoupling,
    VICReg,
)
from tests.integration.siamese import fit, weights


class Rare(AntiCollapseMixin, LightningModule):
    """Three classes of noise, one of them rare, and a head of choice."""

    def __init__(self, head: str = "linear", **regularizers: Any) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
        self.head = {"linear": nn.Linear, "etf": ETFClassifier, "fed": FedETFHead}[head](8, 3)
        if head == "etf":
            regularizers = {"dr": DotRegression(self.head, "batch")}
        self.set_regularizers(regularizers)

    def labels(self, batch: Tensor) -> Tensor:
        return (batch[:, 0] > 0).long() + (batch[:, 0] > 1).long()

    def training_step(self, batch: Tensor) -> Any:
        features, labels = self.encoder(batch), self.labels(batch)
        if isinstance(self.head, ETFClassifier):
            return self.anti_collapse_loss(self.head.embed(features), labels)
        if isinstance(self.head, FedETFHead):
            return self.anti_collapse_loss(self.head(features), labels)
        total = functional.cross_entropy(self.head(features), labels)
        names = ["long_tail"] if "long_tail" in self.regularizers else []
        total = total + self.anti_collapse_loss(features, labels, names=names)
        return total + self.anti_collapse_loss(self.head(features), labels, names=["max_sup", "decoupling"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)

    def recall(self) -> float:
        """Mean over classes, so that the rare one counts as much."""
        rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            right = (self.head(self.encoder(rows)).argmax(dim=1) == self.labels(rows)).float()
        return sum(right[self.labels(rows) == c].mean().item() for c in range(3)) / 3


LOGITS = {"max_sup": MaxSup, "decoupling": SpectralDecoupling}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_losses_of_logits_beside_labels(precision: str) -> None:
    model, logger, _ = fit(lambda: Rare(**{name: make() for name, make in LOGITS.items()}), precision=precision)
    assert weights(model).isfinite().all()
    assert set(logger.rows[-1][1]) >= {"regularizer/max_sup/max_suppression", "regularizer/decoupling/logits"}


def test_class_means_are_trained_and_saved_with_the_model() -> None:
    made = []

    def make() -> LightningModule:
        made.append(Rare(long_tail=LongTailCollapse(3, 8), **{name: make() for name, make in LOGITS.items()}))
        made.append(made[0].regularizers["long_tail"][1].means.detach().clone())
        return made[0]

    model, logger, _ = fit(make)
    means = model.state_dict()["trained_regularizers.long_tail.means"]
    assert not torch.equal(means, made[1])
    (*_, row) = (row for _, row in logger.rows if "regularizer/long_tail/value" in row)
    expected = 0.01 * row["regularizer/long_tail/within"] + 0.1 * row["regularizer/long_tail/between"]
    assert row["regularizer/long_tail/value"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_dot_regression_trains_a_fixed_classifier(precision: str) -> None:
    model, logger, _ = fit(lambda: Rare("etf"), batches=60, batch_size=64, precision=precision)
    assert model.float().recall() > 0.85
    assert [name for name in model.state_dict() if "head" in name] == ["head.weight"]
    torch.testing.assert_close(model.head.weight, ETFClassifier(8, 3).to(model.head.weight).weight, atol=0.01, rtol=0)
    assert set(logger.rows[0][1]) == {"regularizer/dr/value", "regularizer/dr/dot_regression"}
    # a checkpoint with another simplex brings it along, for the loss too
    other = Rare("etf")
    other.head.weight.neg_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.regularizers["dr"][1].classifier.weight, model.head.weight)


def test_balanced_softmax_trains_the_federated_head() -> None:
    model, _, _ = fit(lambda: Rare("fed", balanced=BalancedSoftmax([50, 34, 16])), batches=60, batch_size=64)
    assert model.recall() > 0.85
    assert model.head.scale > 1.5


def test_misuse_is_refused() -> None:
    z, y = torch.randn(8, 4), torch.arange(8) % 3
    model = Rare(long_tail=LongTailCollapse(3, 4))
    with pytest.raises(MisconfigurationException, match=r"'long_tail' \(LongTailCollapse\) takes labels. Pass the int"):
        model.anti_collapse_loss(z)
    with pytest.raises(MisconfigurationException, match=r"'vicreg' \(VICReg\) takes 2 view\(s\), got 1"):
        Rare(vicreg=VICReg()).anti_collapse_loss(z, y)
    assert Rare(vicreg=VICReg()).anti_collapse_loss(z, z, y) == VICReg()(z, z)
    with pytest.raises(ValueError, match=r"LongTailCollapse takes labels, and a layer returns none. Call `self.anti"):
        Regularizer(LongTailCollapse(3, 4), layer="encoder")


def test_no_rows_are_left_out_with_one_warning() -> None:
    model = Rare(balanced=BalancedSoftmax([1, 1, 1]))
    with pytest.warns(UserWarning, match="'balanced' was left out of a step: .*at least 1 row"):
        value = model.anti_collapse_loss(torch.randn(0, 3, requires_grad=True), torch.arange(0))
    assert value == 0
    value.backward()
