"""Regularizers that take labels, through both doors in real fits."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import AntiCollapseMixin, Regularizer
from lightning_collapse.layers import ETFClassifier, FedETFHead
from lightning_collapse.losses import (
    BalancedSoftmax,
    BatchHardTriplet,
    ConR,
    DotRegression,
    LongTailCollapse,
    MaxSup,
    SpectralDecoupling,
    SpreadLoss,
    SupCon,
    VICReg,
)
from tests.integration.siamese import Memory, fit, weights


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
    with pytest.raises(MisconfigurationException, match=r"trainable parameters of LongTailCollapse.*AntiCollapseMixin"):
        fit(Plain, Regularizer(LongTailCollapse(3, 8), layer="encoder"))
    with pytest.raises(ValueError, match=r"`labels` must be a function .* got <.*> for VICReg. Drop it"):
        Regularizer(VICReg(), layer="encoder", labels=lambda batch: batch)
    with pytest.raises(ValueError, match=r"`labels` must be a function .* got 3 for SupCon"):
        Regularizer(SupCon(), layer="encoder", labels=3)
    with pytest.raises(MisconfigurationException, match=r"'conr' \(ConR\) takes labels. Pass the target of each row"):
        Rare(conr=ConR(nn.Linear(4, 1))).anti_collapse_loss(z, z)


class Plain(LightningModule):
    """Pulls everything to the origin; how it calls its layer is for a loss of one view, of two, or of tokens."""

    kind = 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, 1)

    def call(self, batch: Tensor) -> tuple[Tensor, ...]:
        if self.kind == 2:
            return self.encoder(batch), self.encoder(batch.flip(1))
        return (self.encoder(batch.unflatten(0, (-1, 4)) if self.kind == 3 else batch),)

    def training_step(self, batch: Tensor) -> Tensor:
        return sum(features.square().mean() for features in self.call(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class PlainViews(Plain):
    kind = 2


class PlainTokens(Plain):
    kind = 3


class Mixed(AntiCollapseMixin, Plain):
    """The same through the other door, its labels from ``read``."""

    def __init__(self, kind: int, loss: nn.Module, read: Any) -> None:
        super().__init__()
        self.kind, self.read = kind, read
        self.set_regularizers({"it": (0.1, loss)})

    def training_step(self, batch: Tensor) -> Tensor:
        features = [view.flatten(0, -2) for view in self.call(batch)]
        total = sum(view.square().mean() for view in features)
        return total + self.anti_collapse_loss(*features, self.read(batch).flatten())


def classes(batch: Tensor) -> Tensor:
    return (batch[:, 0] > 0).long() + (batch[:, 0] > 1).long()


def tokens(batch: Tensor) -> Tensor:
    return classes(batch).unflatten(0, (-1, 4))


def targets(batch: Tensor) -> Tensor:
    return batch[:, 1]


def mean(rows: Tensor) -> Tensor:
    return rows.mean(dim=1)


@pytest.mark.parametrize(
    ("plain", "make", "read", "precision"),
    [
        (PlainViews, SupCon, classes, "32-true"),
        (PlainViews, SupCon, classes, "bf16-mixed"),
        (PlainViews, SpreadLoss, classes, "32-true"),
        (PlainViews, lambda: ConR(mean), targets, "32-true"),
        (PlainTokens, BatchHardTriplet, tokens, "bf16-mixed"),
        (Plain, BatchHardTriplet, classes, "32-true"),
        (Plain, lambda: BalancedSoftmax([1] * 8), classes, "32-true"),
    ],
)
def test_doors_are_bit_equal(plain: type[Plain], make: Any, read: Any, precision: str) -> None:
    regularizer = Regularizer(make(), layer="encoder", weight=0.1, name="it", labels=read)
    callback, log, _ = fit(plain, regularizer, precision=precision)
    mixin, mixin_log, _ = fit(lambda: Mixed(plain.kind, make(), read), precision=precision)
    assert torch.equal(weights(callback), weights(mixin))
    assert log.rows == mixin_log.rows
    assert all(row["regularizer/it/value"] > 0 for _, row in log.rows)
    assert {f"regularizer/it/{term}" for term in make().coefficients} < set(log.rows[-1][1])


def labels_or_none(batch: Tensor) -> Any:
    labels_or_none.calls += 1
    found = classes(batch)
    return {3: None, 4: found[:5], 5: found.float()}.get(labels_or_none.calls, found)


def test_steps_without_labels_that_fit_are_left_out_with_one_warning() -> None:
    labels_or_none.calls = 0
    regularizer = Regularizer(SupCon(), layer="encoder", labels=labels_or_none)
    with pytest.warns(UserWarning, match=r"needs labels: `labels` returned None. Pass `labels=") as caught:
        _, logger, _ = fit(PlainViews, regularizer, batches=6)
    assert sum("needs labels" in str(w.message) for w in caught) == 1
    steps = [step for step, row in logger.rows if "regularizer/supcon/value" in row]
    assert steps == [0, 1, 5]


def fails(batch: Tensor) -> Tensor:
    raise KeyError("y")


@pytest.mark.parametrize(
    ("read", "match"),
    [
        (None, r"needs labels: the batch has none where they are looked for. Pass `labels=lambda batch"),
        (lambda batch: batch[:3, 0].long(), r"needs labels: `labels` of `Regularizer` must have shape \(16,\).*\(3,\)"),
        (lambda batch: torch.eye(16), r"got \(16, 16\). Pass `labels=`, .*argmax\(dim=1\)`\.$"),
        (targets, r"needs labels: .* must be integers, got torch.float32. Mixed or soft targets name no class\.$"),
        (fails, r"needs labels: `labels` raised KeyError\('y'\)"),
    ],
)
def test_labels_that_do_not_fit_the_first_step_are_refused(read: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(PlainViews, Regularizer(SupCon(), layer="encoder", labels=read))


def beyond(step: int, door: str) -> tuple[Any, Any]:
    """A fit whose labels name a class that there is not in one step, through either door, and what was logged."""
    calls = 0

    def read(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return classes(batch) + 8 * (calls == step)

    def loss() -> BalancedSoftmax:
        return BalancedSoftmax([1] * 8)

    if door == "mixin":
        return fit(lambda: Mixed(1, loss(), read), batches=6)[:2]
    return fit(Plain, Regularizer(loss(), layer="encoder", labels=read, name="it"), batches=6)[:2]


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_a_class_that_there_is_not_is_refused_at_the_start_and_left_out_later(door: str) -> None:
    with pytest.raises(ValueError, match=r"`labels` of `balanced_cross_entropy` must be below 8, .* got (8|9|1\d)"):
        beyond(1, door)
    with pytest.warns(UserWarning, match="must be below 8, the number of classes") as caught:
        _, logger = beyond(3, door)
    assert sum("must be below 8" in str(w.message) for w in caught) == 1
    assert len(logger.rows) == 5


class Marked(nn.Module):
    """Leaves every other row as it is, and makes NaN of the others, or leaves them out."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, rows: Tensor) -> Tensor:
        return rows if self.keep else torch.stack([rows[::2] * torch.nan, rows[1::2]], dim=1).flatten(0, 1)


class Marking(Plain):
    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep, self.mark = keep, Marked(keep)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows = batch[0][1::2] if self.keep else batch[0]
        views = [self.encoder(rows).detach().requires_grad_(), self.encoder(rows.flip(1)).detach().requires_grad_()]
        return 0 * sum(self.mark(view)[-1].sum() for view in views)


def test_labels_are_found_in_the_batch_and_stay_beside_their_rows() -> None:
    """Half of the rows are not finite: the rest is a batch of its own."""

    def last(keep: bool, read: Any) -> float:
        seed_everything(0, verbose=False)
        rows = torch.randn(64, 16)
        data, logger = DataLoader(TensorDataset(rows, classes(rows)), batch_size=16), Memory()
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [Regularizer(SupCon(), layer="mark", labels=read)]
        trainer = Trainer(max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=callbacks, **quiet)
        trainer.fit(Marking(keep), data)
        return logger.rows[-1][1]["regularizer/supcon/supervised"]

    with pytest.warns(UserWarning, match="rows of the layer are NaN or infinite"):
        found = last(False, None)
    assert found == pytest.approx(last(True, lambda batch: batch[1][1::2]), rel=1e-6)


def test_both_views_in_one_call() -> None:
    class Stacked(Plain):
        def training_step(self, batch: Tensor) -> Tensor:
            return self.encoder(torch.cat([batch, batch.flip(1)])).square().mean()

    def trained(read: Any) -> Tensor:
        return weights(fit(Stacked, Regularizer(SupCon(), layer="encoder", chunk=2, labels=read))[0])

    assert torch.equal(trained(classes), trained(lambda batch: classes(batch).repeat(2)))


class Collapsed(Plain):
    def call(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(0 * batch),)


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_a_triplet_loss_that_stays_at_collapse_is_told_once(door: str) -> None:
    def run(make: Any, *callbacks: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(make, *callbacks, batches=8)
        return [str(w.message) for w in caught if "stays within 1 %" in str(w.message)]

    class MixedCollapsed(Mixed):
        call = Collapsed.call

    def told(apart: bool) -> list[str]:
        loss = BatchHardTriplet(0.3)
        if door == "callback":
            return run(Plain if apart else Collapsed, Regularizer(loss, layer="encoder", name="it", labels=classes))
        return run(lambda: (Mixed if apart else MixedCollapsed)(1, loss, classes))

    (message,) = told(apart=False)
    assert message.startswith("`regularizer/it`: the loss stays within 1 % of 0.3, its value where all rows are equal")
    assert not told(apart=True)


def test_no_rows_are_left_out_with_one_warning() -> None:
    model = Rare(balanced=BalancedSoftmax([1, 1, 1]))
    with pytest.warns(UserWarning, match="'balanced' was left out of a step: .*at least 1 row"):
        value = model.anti_collapse_loss(torch.randn(0, 3, requires_grad=True), torch.arange(0))
    assert value == 0
    value.backward()
