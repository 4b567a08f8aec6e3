"""What a fit is taken for, what is said about it, and what it changes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard
from lightning_collapse.callbacks.guard.task_inference import infer_task
from lightning_collapse.monitoring.loss_use import LossUse
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, Claims, fit

pytestmark = pytest.mark.filterwarnings("ignore:`.*Monitor`. the fit ended before")  # planted points instead

REAL = torch.randn(8, 16)
LABELS, TOKENS = torch.zeros(8, dtype=torch.long), torch.randint(3, (8, 16))
BATCHES = {
    "labels": [REAL, LABELS],
    "targets": [REAL, torch.randn(8, 3)],
    "two views": [REAL, REAL + 1],
    "labels that ride along": {"views": [REAL, REAL + 1], "y": LABELS},
    "no targets": REAL,
    "tokens": TOKENS,
    "next tokens": [TOKENS, TOKENS.roll(-1, 1)],
    "texts with labels": {"input_ids": TOKENS, "labels": LABELS},
    "texts and next tokens": {"input_ids": TOKENS, "labels": TOKENS.clone()},
    "texts with scores": {"input_ids": TOKENS, "labels": torch.randn(8)},
    "no tensors": ["a", "b"],
}


class Net(LightningModule):
    """Its loss is the one that the names of :data:`BATCHES` promise."""

    def __init__(self, outputs=3):
        super().__init__()
        self.table = nn.Embedding(3, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, outputs)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        views, y = (batch["views"], None) if isinstance(batch, dict) and "views" in batch else (batch, None)
        if isinstance(batch, dict) and "labels" in batch:
            views, y = batch["input_ids"], batch["labels"]
        if isinstance(views, (list, tuple)):
            views, y = views
        if not isinstance(views, torch.Tensor):
            return self(torch.ones(8, 16)).pow(2).mean()
        if y is None and views.is_floating_point():
            y = views + 1
        if views.is_floating_point():
            return self._real(views, y)
        return self._words(views, views if y is None else y)

    def _real(self, x, y):
        if y.shape == x.shape:
            return -(self(x) * self(y)).sum(1).mean()
        scores = self(x)
        return mse_loss(scores, y[:, : scores.shape[1]]) if y.ndim > 1 else cross_entropy(scores, y)

    def _words(self, x, y):
        if y.ndim > 1:
            shift = 0 if y.data_ptr() != x.data_ptr() else 1
            scores = self(self.table(x))[:, : x.shape[1] - shift]
            return cross_entropy(scores.flatten(0, 1), y[:, shift:].flatten() % scores.shape[2])
        scores = self(self.table(x).mean(1))
        return mse_loss(scores[:, 0], y) if y.is_floating_point() else cross_entropy(scores, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def taken(batch, *monitors, task=None, outputs=3):
    guard = CollapseGuard(action="log", task=task)
    loader = DataLoader([batch], batch_size=None)
    fit(Net(outputs), [*(monitors or [Claims()]), guard], loader)
    return guard.task


@pytest.mark.parametrize(
    ("batch", "name", "directions"),
    [
        ("labels", "classification", 2),
        ("targets", "regression", 3),
        ("two views", "self-supervised", 0),
        ("labels that ride along", "self-supervised", 0),
        ("no targets", "self-supervised", 0),
        ("tokens", "language model", 0),
        ("next tokens", "language model", 0),
        ("texts with labels", "classification", 2),
        ("texts and next tokens", "language model", 0),
        ("texts with scores", "regression", 3),
        ("no tensors", "", 0),
    ],
)
def test_from_the_loss(batch, name, directions):
    task = taken(BATCHES[batch])
    assert (task.name, task.directions) == (name, directions)


def test_a_monitor_speaks_where_the_loss_does_not_and_two_that_disagree_do_not():
    labels = Claims("neural_collapse")
    real = Claims("regression_collapse")
    task = taken(BATCHES["no tensors"], labels)
    assert (task.name, task.outputs, task.directions) == ("classification", {"head"}, 2)
    assert taken(BATCHES["no tensors"], labels, real).name == ""
    assert taken(BATCHES["labels"], real).name == "classification"  # by the loss


def test_labels_that_the_step_made_name_outputs_and_no_ends():
    use = LossUse(why="labels of its own", compared=("head",))
    unknown = infer_task(SimpleNamespace(callbacks=[]), Net(), use)
    assert (unknown.name, unknown.outputs, unknown.last) == ("", {"head"}, set())
    for task in (
        infer_task(SimpleNamespace(callbacks=[Claims("neural_collapse")]), Net(), use),
        infer_task(SimpleNamespace(callbacks=[]), Net(), use, "classification"),
    ):
        assert (task.name, task.directions) == ("classification", 2)
        assert {"head.input", "body"} <= task.last


def test_it_is_said_once_and_not_where_it_was_told(caplog):
    with caplog.at_level(logging.INFO):
        taken(BATCHES["labels"])
    [said] = [record.message for record in caplog.records if "takes this for" in record.message]
    assert said == (
        "`CollapseGuard` takes this for classification, which may end in 2 direction(s), from its loss, which compares"
        " the output of `head` with `1` of the batch (NllLoss). Say otherwise with `task=`: classification,"
        " multi-label, regression, language model, self-supervised, reconstruction, denoising, reinforcement."
        " How the outputs of `head` lie is up to the targets, and not judged."
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert taken(BATCHES["no tensors"]).outputs == set()
    [said] = [record.message for record in caplog.records if "`task=`" in record.message]
    assert "does not know the task: nothing that the loss compares was found in the batch. Every layer is" in said
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert taken(BATCHES["labels"], task="self-supervised").directions == 0
    assert not [record for record in caplog.records if "takes this for" in record.message]


def test_the_last_layers():
    assert taken(BATCHES["labels"]).last == {"body", "body.2", "body.3", "head", "head.input"}


class Planted(Callback):
    """Readings of a layer, one point per step."""

    def __init__(self, layer, values, measures):
        self.layer, self.values, self.measures = layer, values, measures

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {**HEALTHY, **dict.fromkeys(self.measures, self.values[batch_idx])}
        points = [Point("collapse", self.layer, m, batch_idx, value, 64, 60.0) for m, value in values.items()]
        publish(trainer, pl_module, points)


RANKS = ("effective_rank", "eigenvalue_effective_rank")
SPREADS = ("relative_spread", "direction_spread")


PLATEAU = 45
"""Points of the last layers of a classifier, or a language model, that does not learn, before anything is said."""


def judged(values, outputs, layer="head.input", batch="labels", task=None, measures=RANKS):
    values = values + values[-1:] * PLATEAU
    guard = CollapseGuard(action="log", task=task)
    monitor = Claims()
    loader = DataLoader([BATCHES[batch]] * len(values), batch_size=None)
    trainer = fit(Net(outputs), [monitor, guard, Planted(layer, values, measures)], loader)
    return guard, trainer


def test_a_binary_classifier_that_ends_on_a_line_is_news():
    guard, trainer = judged([30.0] * 4 + [1.0] * 4, outputs=2)
    assert guard.verdicts == []
    [notice] = guard.notices
    assert (notice.kind, notice.layer) == ("dimensional_collapse", "head.input")
    assert (notice.since, notice.step) == (PLATEAU - 1, PLATEAU)
    assert notice.evidence.endswith("; classification ends in 1 direction(s) there, and this is no failure")
    assert trainer.callback_metrics["guard/dimensional_collapse"] == 0


def test_what_goes_on_falling_is_a_failure_after_all():
    guard, _ = judged([60.0] * 4 + [5.5] * PLATEAU + [1.0] * 4, outputs=10)
    assert [notice.since for notice in guard.notices] == [PLATEAU - 1]
    assert [verdict.since for verdict in guard.verdicts] == [PLATEAU + 4]


@pytest.mark.parametrize(
    "facts",
    [
        {"outputs": 10},  # nine directions are to be left
        {"outputs": 3},
        {"outputs": 2, "layer": "body.0"},  # not among the last
        {"outputs": 2, "batch": "two views"},
        {"outputs": 2, "task": "self-supervised"},
        {"outputs": 2, "batch": "targets"},
        {"outputs": 1, "task": "language model"},
    ],
)
def test_one_direction_is_a_failure(facts):
    guard, _ = judged([30.0] * 4 + [1.0] * 4, **facts)
    assert [verdict.kind for verdict in guard.verdicts] == ["dimensional_collapse"]
    assert guard.notices == []


def test_one_direction_is_where_a_regression_of_one_target_ends():
    guard, _ = judged([30.0] * 4 + [1.0] * 4, outputs=1, batch="targets")
    assert (len(guard.verdicts), len(guard.notices)) == (0, 1)


@pytest.mark.parametrize("batch", ["labels", "targets", "tokens"])
def test_outputs_follow_their_targets(batch):
    equal = [0.6] * 4 + [1e-3] * 4
    assert judged(equal, 3, layer="head", batch=batch, measures=SPREADS)[0].verdicts == []
    guard, _ = judged(equal, 3, layer="head.input", batch=batch, measures=SPREADS)
    assert [verdict.kind for verdict in guard.verdicts] == ["complete_collapse"]


def test_outputs_without_targets_are_a_representation():
    guard, _ = judged([0.6] * 4 + [1e-3] * 4, 3, layer="head", batch="no targets", measures=SPREADS)
    assert [verdict.kind for verdict in guard.verdicts] == ["complete_collapse"]


def test_a_narrow_cone_is_where_language_models_live():
    guard, _ = judged([0.6] * 8 + [0.05] * 4 + [1e-3] * 4, 3, layer="body.0", batch="tokens", measures=SPREADS)
    assert [(notice.kind, notice.since) for notice in guard.notices] == [("complete_collapse", 8)]
    assert "narrow cone" in guard.notices[0].evidence
    assert [(verdict.kind, verdict.since) for verdict in guard.verdicts] == [("complete_collapse", 12)]
    shrunk, _ = judged([0.6] * 8 + [0.05] * 4, 3, layer="body.0", batch="tokens", measures=("feature_std", *SPREADS))
    assert shrunk.verdicts == []
    dead, _ = judged([10.0] * 4 + [0.05] * 4, 3, layer="body.0", batch="tokens", measures=("feature_std", *SPREADS))
    assert [verdict.kind for verdict in dead.verdicts] == ["complete_collapse"]


@pytest.mark.parametrize("layer", ["body.0", "head.input"])
def test_a_monitor_of_regression_collapse_silences_no_other_rule(layer):
    guard = CollapseGuard(action="log")
    monitors = [Claims(), Claims("regression_collapse")]
    values = [30.0] * 4 + [1.0] * 4
    loader = DataLoader([BATCHES["targets"]] * len(values), batch_size=None)
    fit(Net(3), [*monitors, guard, Planted(layer, values, RANKS)], loader)
    assert [verdict.kind for verdict in guard.verdicts] == ["dimensional_collapse"]
    assert [verdict.kind for verdict in judged(values, 3, layer, "targets")[0].verdicts] == ["dimensional_collapse"]


class Tower(Net):
    """An encoder whose last layer is the last of all."""

    def __init__(self, outputs=3):
        super().__init__(outputs)
        self.body.append(nn.Linear(32, 8))
        del self.head

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("net", "batch", "outputs"),
    [
        (Net(3), "labels", {"head"}),
        (Net(3), "targets", {"head"}),
        (Net(3), "no targets", set()),
        (Tower(), "labels", {"body", "body.4"}),  # one and the same tensor
        (Net(3), "no tensors", set()),
    ],
)
def test_which_outputs_are_left_to_the_targets(net, batch, outputs, caplog):
    guard = CollapseGuard(action="log")
    with caplog.at_level(logging.INFO):
        fit(net, [Claims(), guard], DataLoader([BATCHES[batch]], batch_size=None))
    assert guard.task.outputs == outputs
    [said] = [record.message for record in caplog.records if "`task=`" in record.message]
    assert ("How the outputs of" in said) == bool(outputs)
