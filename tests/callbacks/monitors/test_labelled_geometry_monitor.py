"""Any layers by any labels: what they are sorted by, and what noise would read."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import LabelledGeometryMonitor
from lightning_collapse.functional import collapse_nulls
from lightning_collapse.monitoring.class_readings import label_readings
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.seen_classes import SeenClasses
from lightning_collapse.utilities.points import Flag
from tests.toys import PointKeeper, fit


class Tokens(LightningModule):
    """Tokens ``(N, T, 6)``, then one row per sequence; a loss without any labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.seen = nn.Linear(6, 8), nn.Linear(8, 3), []

    def training_step(self, batch, batch_idx):
        rows = self.body(batch["x"])
        self.seen.append(rows.detach().clone())
        return self.head(rows.mean(dim=1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data(count=4, size=40, length=3):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        site, y = torch.randint(3, (size,), generator=generator), torch.randint(4, (size, length), generator=generator)
        x = torch.randn(size, length, 6, generator=generator)
        x[:, :, 0] += 20.0 * site.unsqueeze(1)
        batches.append({"x": x, "site": 1000 * site, "token": y})
    return batches


def watch(model, batches, *args, **kwargs):
    keeper, monitor = PointKeeper(), LabelledGeometryMonitor(*args, **kwargs)
    fit(model, [monitor, keeper], DataLoader(batches, batch_size=None))
    step = keeper.points[-1].step
    return {(p.layer, p.measure): p for p in keeper.points if p.step == step}


SETS = {"site": lambda batch: batch["site"], "token": lambda batch: batch["token"]}


def test_readings_of_two_sets_of_labels():
    model, batches = Tokens(), data()
    found = watch(model, batches, ["body"], SETS, every_n_steps=4, rows=480)
    for name, classes in (("site", 3), ("token", 4)):
        moments = ClassMoments(classes, 8)
        for rows, batch in zip(model.seen, batches, strict=True):
            labels = batch["token"] if name == "token" else batch["site"].unsqueeze(1).expand(-1, 3) // 1000
            moments.update(rows.flatten(0, 1), labels.flatten())
        expected = label_readings(SeenClasses(torch.arange(classes), moments, None, torch.zeros(())))
        nulls = collapse_nulls(480, classes, 8)
        for curve in LabelledGeometryMonitor.declares[:-1]:
            point = found[f"body.{name}", curve.name]
            assert point.value == pytest.approx(expected[curve.name].item(), rel=1e-4), curve.name
            assert point.null == pytest.approx(nulls.get(curve.name, math.nan), nan_ok=True)
    assert found["body.site", "between_share"].value > 0.9
    assert found["body.token", "between_share"].value < 0.05
    assert found["body.token", "log_cdnv"].value == pytest.approx(found["body.token", "log_cdnv"].null, abs=2)


def test_the_layer_and_the_labels_by_default():
    batches = [{"x": batch["x"], "y": batch["site"]} for batch in data()]
    found = watch(Tokens(), batches, every_n_steps=4, rows=160)
    assert {layer for layer, _ in found} == {"head.input"}
    assert found["head.input", "classes"].value == 3
    assert found["head.input", "n"].value == 160


def test_labels_that_do_not_fit_are_left_out_with_a_warning():
    bad = {"site": SETS["site"], "few": lambda batch: batch["site"][:7], "none": lambda batch: None}
    with (
        pytest.warns(UserWarning, match="`body` returned rows that the labels do not fit, 120 for 7;.*`labels=`"),
        pytest.warns(UserWarning, match="the batch has no integer labels 'none'"),
        pytest.warns(UserWarning, match="`body.few`, `body.none` had no labelled rows"),
    ):
        found = watch(Tokens(), data(), ["body"], bad, every_n_steps=4, rows=480)
    assert found["body.site", "n"].value == 480
    assert found["body.few", "flag"].value == Flag.NOT_CALLED
    assert math.isnan(found["body.none", "nc1"].value)


def test_a_layer_that_never_runs_is_named_and_an_empty_batch_is_not():
    model, batches = Tokens(), data(3)
    model.unused = nn.Linear(2, 2)
    batches.insert(1, {name: tensor[:0] for name, tensor in batches[0].items()})
    model.training_step = lambda batch, batch_idx: model.head(model.body(batch["x"])).square().sum()
    with pytest.warns(UserWarning, match="`unused` did not run before every point") as caught:
        found = watch(model, batches, ["body", "unused"], SETS["site"], every_n_steps=4, rows=480)
    assert found["body", "n"].value == 360
    assert not [str(w.message) for w in caught if "0 labels" in str(w.message)]


def test_labels_of_which_no_two_rows_share_one_are_told_from_none():
    labels = {"each": lambda batch: torch.arange(batch["token"].numel())}
    batches = data(1, size=4)
    with pytest.warns(UserWarning, match=r"`body\.each` had no two rows of one label before a point"):
        found = watch(Tokens(), batches, ["body"], labels, every_n_steps=1)
    assert found["body.each", "flag"].value == Flag.FEW_ROWS


@pytest.mark.parametrize("labels", ["site", {}, {"": len}, {"site": "x"}, {1: len}])
def test_bad_labels_are_refused(labels):
    with pytest.raises(ValueError, match="`labels` takes a function from a batch to integers, or a mapping"):
        LabelledGeometryMonitor(labels=labels)


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"`rows` must be at least 2, .* got 1"):
        LabelledGeometryMonitor(rows=1)
