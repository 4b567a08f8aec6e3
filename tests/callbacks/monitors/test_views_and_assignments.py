"""What ``CollapseMonitor`` draws of prototypes, routers, maps and views, and what it knows of the loss."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.callbacks import loss_reader
from lightning_collapse.functional import assignment_null, assignment_perplexity
from tests.toys import QUIET, MemoryLogger, Toy, batches, fit

PROTOTYPES = 24


class Dino(Toy):
    """Two views choose prototypes, and the one is to choose what the other does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, PROTOTYPES)
        self.center = torch.linspace(-0.1, 0.1, PROTOTYPES)

    def training_step(self, batch, batch_idx):
        # of an untrained network a view must be near to be found
        views = batch, batch + 0.1 * batch.roll(1, 1)
        self.scores = [self.head(self.encoder(view)) for view in views]
        student, teacher = self.scores[0], self.scores[1].detach()
        chosen = ((teacher - self.center) / 0.04).softmax(1)
        return -(chosen * (student / 0.1).log_softmax(1)).sum(1).mean()


class Router(Toy):
    """Four experts, weighed by a router, and a regression."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 2) for _ in range(4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.encoder(x)
        self.scores = [self.router(features)]
        outputs = torch.stack([expert(features) for expert in self.experts], dim=1)
        mixed = (self.scores[0].softmax(1).unsqueeze(2) * outputs).sum(1)
        return mse_loss(self.head(features) + mixed, y)


class Classifier(Toy):
    """A softmax, with which labels are compared."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.head(self.encoder(x)), y)


def with_targets(labels):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(192, 16, generator=draw)
    y = torch.randint(2, (192,), generator=draw) if labels else torch.randn(192, 2, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def watch(model, layers, loader=None, **kwargs):
    monitor = CollapseMonitor(layers=layers, every_n_steps=1, rows=64)
    return fit(model, [monitor], loader, **kwargs).logger


def layers_with(logger, measure):
    return {key.split("/")[1] for _, row in logger.rows for key in row if key.endswith(f"/{measure}")}


@pytest.mark.parametrize(
    ("model", "loader", "head"),
    [(Dino, batches(), "head"), (Router, with_targets(labels=False), "router")],
    ids=["prototypes", "experts"],
)
def test_choices_are_drawn_of_a_softmax_that_no_target_is_compared_with(model, loader, head):
    toy = model()
    logger = watch(toy, ["encoder", head], loader, max_steps=1)
    assert layers_with(logger, "assignment_perplexity") == {head}
    [(step, value)] = logger.curve(f"collapse/{head}/assignment_perplexity")
    assert step == 0
    assert value == pytest.approx(assignment_perplexity(torch.cat(toy.scores).detach()).item())


def test_the_null_is_of_as_many_rows_and_outputs():
    class Keep(CollapseMonitor):
        def points(self, step, numbers):
            self.kept = super().points(step, numbers)
            return self.kept

    monitor = Keep(layers=["head"], every_n_steps=1, rows=64)
    fit(Dino(), [monitor], max_steps=1)
    [point] = [point for point in monitor.kept if point.measure == "assignment_perplexity"]
    assert (point.n, point.null) == (64, assignment_null(64, PROTOTYPES))


def test_nothing_is_drawn_of_the_scores_of_a_classifier():
    logger = watch(Classifier(), ["encoder", "head"], with_targets(labels=True))
    assert layers_with(logger, "feature_std") == {"encoder", "head"}
    assert not layers_with(logger, "assignment_perplexity")


class Maps(Toy):
    """Convolutions, and one or a ``Linear`` in the end."""

    def __init__(self, ends_in_maps):
        super().__init__()
        self.ends_in_maps = ends_in_maps
        self.encoder = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 1, 1) if ends_in_maps else nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        maps = self.encoder(batch).relu()
        return self.head(maps if self.ends_in_maps else maps.mean((2, 3))).square().mean()


@pytest.mark.parametrize(("ends_in_maps", "n"), [(True, 4 * 6 * 6), (False, 4)])
def test_maps_are_read_by_position_where_the_model_ends_in_maps(ends_in_maps, n):
    loader = DataLoader(torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), batch_size=4)
    monitor = CollapseMonitor(layers=["encoder"], every_n_steps=1, rows=1000)
    logger = fit(Maps(ends_in_maps), [monitor], loader, max_steps=1).logger
    assert logger.curve("collapse/encoder/n") == [(0, n)]


@pytest.mark.parametrize("guard_first", [True, False])
def test_guard_and_monitor_share_one_reading_of_the_loss(monkeypatch, guard_first):
    read, calls = loss_reader.read_loss, []

    def count(*arguments):
        calls.append(1)
        return read(*arguments)

    monkeypatch.setattr(loss_reader, "read_loss", count)
    guard, monitor = CollapseGuard(action="log"), CollapseMonitor(["encoder", "head"], every_n_steps=1)
    for fits in (1, 2):
        callbacks = [guard, monitor] if guard_first else [monitor, guard]
        logger = fit(Dino(), callbacks).logger
        assert guard.task.name == "self-supervised"
        assert layers_with(logger, "assignment_perplexity") == {"head"}
        assert len(calls) == fits


def test_a_monitor_reads_the_loss_without_a_guard_and_two_share_it(monkeypatch):
    read, calls = loss_reader.read_loss, []
    monkeypatch.setattr(loss_reader, "read_loss", lambda *arguments: calls.append(1) or read(*arguments))
    monitors = [CollapseMonitor([layer], every_n_steps=1) for layer in ("encoder", "head")]
    logger = fit(Dino(), monitors).logger
    assert layers_with(logger, "assignment_perplexity") == {"head"}
    assert len(calls) == 1


def test_a_resumed_fit_draws_what_an_uninterrupted_one_does(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(path=None):
        torch.manual_seed(0)
        monitor = CollapseMonitor(["encoder", "head"], every_n_steps=1, rows=64)
        guard = CollapseGuard(action="log")
        settings = {**QUIET, "logger": MemoryLogger(), "max_epochs": 2}
        trainer = Trainer(**settings, callbacks=[monitor, guard, Save()])
        trainer.fit(Dino(), batches(), ckpt_path=path)
        return trainer, guard

    whole, guard = run()
    rest, again = run(tmp_path / "0.ckpt")
    for key in (
        "collapse/head/assignment_perplexity",
        "views/encoder/recall_at_1",
        "views/encoder/alignment",
        "views/head/recall_at_1",
    ):
        expected = whole.logger.curve(key)
        assert len(expected) == 12, key
        assert rest.logger.curve(key) == expected[6:], key
    assert again.task.embeddings == guard.task.embeddings
    assert again.state_dict() == guard.state_dict()
