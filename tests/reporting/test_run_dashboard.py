"""The dashboard of a run: a chart for what it draws, none that is empty, and what the charts mean told once."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, CollapseMonitor, Monitor, Regularizer, SpectralAlignmentMonitor
from lightning_collapse.losses import VarianceLoss
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import Curve
from tests.toys import PointKeeper, Toy, batches, fit

HEALTH = {"n", "flag", "nonfinite_fraction"}


class Late(Monitor):
    """Draws nothing before its third point."""

    family = "late"
    declares = (Curve("glow", "a tube", "0 to 1", "0"),)

    def start(self, trainer, pl_module):
        pass

    def points(self, step, numbers):
        return [Point("late", "tube", "glow", step, 1.0)] if step > 3 else []


class Swapped(LightningModule):
    """Prototypes that see two views of every sample, and that no target is compared with."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.prototypes = nn.Linear(16, 24, bias=False)

    def training_step(self, batch, batch_idx):
        first, second = (self.prototypes(self.encoder(batch + 0.01 * torch.randn_like(batch))) for _ in range(2))
        return -(first.detach().softmax(1) * second.log_softmax(1)).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def events_of(logger):
    logger.experiment.close()
    return EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()


def charts_of(events):
    """Tags by chart, as the last layout has them."""
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    tags = events.Tags()["scalars"]
    return {
        (category.title, chart.title): [
            tag for tag in tags for pattern in chart.multiline.tag if re.match(pattern, tag)
        ]
        for category in layout.category
        for chart in category.chart
    }


def texts_of(events, name):
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{name}/text_summary")]


@pytest.fixture(scope="module")
def six_lines(tmp_path_factory):
    torch.manual_seed(0)
    logger = TensorBoardLogger(tmp_path_factory.mktemp("logs"))
    fit(Toy(), [CollapseMonitor(), CollapseGuard()], batches(12), logger=logger, log_every_n_steps=2)
    return events_of(logger)


def test_no_chart_of_the_six_lines_is_empty_and_no_curve_without_one(six_lines):
    charts = charts_of(six_lines)
    assert all(charts.values())
    assert sorted(tag for tags in charts.values() for tag in tags) == sorted(
        tag for tag in six_lines.Tags()["scalars"] if tag.startswith(("collapse/", "guard/"))
    )
    assert [chart for category, chart in charts if category == "Health"] == ["n", "flag"]
    assert [category for category, _ in charts].count("Guard") == 1
    assert len(charts) == 8


def test_the_legend_is_told_once_has_what_is_drawn_and_comes_after_verdicts(six_lines):
    [table] = texts_of(six_lines, "legend/curves")
    names = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    drawn = {tag.rpartition("/")[2] for tag in six_lines.Tags()["scalars"] if tag.startswith("collapse/")}
    assert {name.rpartition("/")[2] for name in names} == drawn
    assert min(tag for tag in six_lines.Tags()["tensors"] if tag.endswith("text_summary")) > "guard/verdict"


def test_what_begins_later_joins(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monitors = [CollapseMonitor(["encoder"], every_n_steps=2), SpectralAlignmentMonitor(every_n_steps=4), Late(2)]
    fit(Toy(), [*monitors, Regularizer(VarianceLoss(), on="encoder")], batches(12), logger=logger, log_every_n_steps=6)
    events = events_of(logger)
    charts = charts_of(events)
    assert all(charts.values())
    assert ("Late", "glow") in charts
    assert {category for category, _ in charts} == {"Collapse", "Spectral alignment", "Late", "Regularizer", "Health"}
    rows = "\n".join(texts_of(events, "legend/curves")).splitlines()
    told = [row for row in rows if row.startswith("| `")]
    assert len(set(told)) == len(told)
    assert sum("`late/glow`" in row for row in told) == 1


def test_one_more_task_with_the_same_logger_says_nothing_twice(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for _ in range(2):
        fit(Toy(), [CollapseMonitor(["encoder"], every_n_steps=2)], logger=logger)
    events = events_of(logger)
    assert len(texts_of(events, "legend/curves")) == 1
    assert len(events.Tensors("custom_scalars__config__")) == 1


def test_in_low_detail_health_is_read_but_not_drawn():
    keeper = PointKeeper()
    monitor = CollapseMonitor(["encoder"], every_n_steps=2, detail="low", validation=True)
    trainer = fit(
        Toy(), [monitor, CollapseGuard(), keeper], batches(12), limit_val_batches=1, check_val_every_n_epoch=1
    )
    drawn = {key for _, row in trainer.logger.rows for key in row}
    assert {"collapse/encoder/effective_rank", "guard/non_finite"} <= drawn
    assert not {key for key in drawn if key.rpartition("/")[2] in HEALTH}
    assert {point.measure for point in keeper.points} >= HEALTH
    assert "collapse/encoder/n" in trainer.callback_metrics


def test_detail_is_high_or_low():
    with pytest.raises(ValueError, match="`detail` must be 'high' or 'low', got 'some'"):
        CollapseMonitor(detail="some")


@pytest.mark.parametrize(("detail", "at_most"), [("high", 12), ("low", 10)])
def test_a_layer_has_at_most_twelve_curves_and_the_run_says_how_many(detail, at_most, caplog):
    torch.manual_seed(0)
    data = DataLoader(torch.randn(12 * 32, 16), batch_size=32)
    with caplog.at_level("INFO"):
        trainer = fit(Swapped(), [CollapseMonitor(every_n_steps=2, detail=detail)], data)
    drawn = {key for _, row in trainer.logger.rows for key in row}
    of_layer = {}
    for key in drawn:
        of_layer.setdefault(key.split("/")[1], []).append(key)
    assert "collapse/prototypes/assignment_perplexity" in drawn
    assert "views/prototypes/recall_at_1" in drawn
    assert max(map(len, of_layer.values())) == at_most
    assert f": {len(drawn)} curves, at most {at_most} of a layer. Choose others with `layers=[...]`." in caplog.text
    assert all(layer in caplog.text for layer in of_layer)


class Headless(Swapped):
    """Its classifier, which is registered last, is never called: other layers are watched from the second batch on."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(24, 10)


def test_layers_that_join_after_the_first_batch_are_counted(caplog):
    torch.manual_seed(0)
    data = DataLoader(torch.randn(12 * 32, 16), batch_size=32)
    with caplog.at_level("INFO"):
        trainer = fit(Headless(), [CollapseMonitor(every_n_steps=2)], data)
    last = {key for step, row in trainer.logger.rows for key in row if step == 11}
    assert "collapse/prototypes.input/effective_rank" in last
    assert not any("classifier" in key for key in last)
    [said] = [record.message for record in caplog.records if "watches" in record.message]
    assert f": {len(last)} curves" in said
