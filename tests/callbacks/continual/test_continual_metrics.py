"""Every task after every task, against accuracies taken by hand, and unseen by the training."""

from itertools import pairwise
from math import isnan

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_collapse import ContinualMetrics
from lightning_collapse.callbacks.continual.task_pictures import GapHistory
from lightning_collapse.functional import average_accuracy, backward_transfer, forgetting, forward_transfer
from lightning_collapse.utilities.points import Flag
from tests.continual import CLASSES, WIDTH, Learner, accuracy, held_out, task, training
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, weights

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
TASKS = (1, 2, 3)


def learn(model, callbacks, seeds=TASKS, logger=None, **kwargs):
    for seed in seeds:
        options = {**QUIET, "logger": logger or False, "max_epochs": 2, "callbacks": list(callbacks), **kwargs}
        trainer = Trainer(**options)
        trainer.fit(model, training(seed))
    return trainer


class ByHand(Callback):
    """Accuracies at the end of every fit, and before the last batch of every epoch."""

    def __init__(self):
        self.rows, self.steps = [], []

    def on_train_end(self, trainer, pl_module):
        self.rows.append([accuracy(pl_module, seed) for seed in TASKS])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append([accuracy(pl_module, seed) for seed in TASKS])


def test_matrix_and_curves_are_those_by_hand():
    model = Learner()
    baseline = torch.tensor([accuracy(model, seed) for seed in TASKS])
    metrics, by_hand, keeper = ContinualMetrics([held_out(seed) for seed in TASKS]), ByHand(), PointKeeper()
    trainer = learn(model, [metrics, by_hand, keeper])
    assert torch.allclose(metrics.values, torch.tensor(by_hand.rows))
    assert torch.allclose(metrics.baseline, baseline)
    assert not torch.equal(metrics.values[0], metrics.values[2])

    last = {point.key: point for point in keeper.points if point.step == keeper.points[-1].step}
    assert last["continual/accuracy"].value == pytest.approx(average_accuracy(metrics.values).item())
    assert last["continual/backward_transfer"].value == pytest.approx(backward_transfer(metrics.values).item())
    assert last["continual/forgetting"].value == pytest.approx(forgetting(metrics.values).item())
    forward = forward_transfer(metrics.values, baseline).item()
    assert last["continual/forward_transfer"].value == pytest.approx(forward)
    assert last["continual/task1/accuracy"].n == 48
    assert trainer.callback_metrics["continual/learning_accuracy"] == pytest.approx(
        metrics.values.diagonal().mean().item()
    )
    first = {point.key: point.value for point in keeper.points if point.step == keeper.points[0].step}
    assert isnan(first["continual/forgetting"])
    assert not any("min_accuracy" in point.key for point in keeper.points)


def test_x_axis_goes_on_and_dips_are_seen():
    model, by_hand, keeper = Learner(), ByHand(), PointKeeper()
    metrics = ContinualMetrics([held_out(seed) for seed in TASKS], every_n_steps=2)
    learn(model, [metrics, by_hand, keeper])
    curve = keeper.curve("continual/task0/accuracy")
    assert [p.step for p in curve] == [12, *range(13, 24, 2), 24, *range(25, 36, 2), 36]
    steps, ends = torch.tensor(by_hand.steps), torch.tensor(by_hand.rows)
    assert [p.value for p in curve[1:7]] == pytest.approx(steps[13:24:2, 0].tolist())
    lowest = torch.stack([steps[13::2, 0].min(), steps[25::2, 1].min()])  # since each ended
    lowest = torch.minimum(lowest, torch.stack([ends[1:, 0].min(), ends[2, 1]]))
    point = keeper.curve("continual/min_accuracy")[-1]
    assert point.value == pytest.approx(lowest.mean().item())
    worst = keeper.curve("continual/worst_case_accuracy")[-1].value
    assert worst == pytest.approx((ends[2, 2].item() + lowest.sum().item()) / 3)
    assert worst <= keeper.curve("continual/accuracy")[-1].value
    assert not [p for p in keeper.curve("continual/min_accuracy") if p.step <= 12]


def test_training_does_not_notice():
    """Weights, buffers, flags and random numbers, with loaders that shuffle by the trainer's own generators."""

    def run(measured):
        torch.manual_seed(0)
        model = Learner()
        model.body[1].eval()  # frozen statistics stay frozen
        loaders = [DataLoader(task(seed), batch_size=20, shuffle=True) for seed in TASKS]
        metrics = [ContinualMetrics(loaders, every_n_steps=1)] if measured else []
        learn(model, metrics)
        return weights(model), torch.rand(3), [module.training for module in model.modules()]

    (one, after, flags), (other, afterwards, same) = run(False), run(True)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(after, afterwards)
    assert flags == same


def test_state_goes_through_a_checkpoint(tmp_path):
    whole, parts, model = PointKeeper(), PointKeeper(), Learner()
    loaders = [held_out(seed) for seed in TASKS]
    metrics = ContinualMetrics(loaders, every_n_steps=3)
    torch.manual_seed(1)
    learn(model, [metrics, whole])

    torch.manual_seed(1)
    model, before = Learner(), ContinualMetrics(loaders, every_n_steps=3)
    trainer = learn(model, [before, parts], TASKS[:2])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    after = ContinualMetrics(loaders, every_n_steps=3)
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"][before.state_key]
    after.load_state_dict(state)
    learn(model, [after, parts], TASKS[2:])
    assert repr(parts.points) == repr(whole.points)
    assert torch.equal(after.values, metrics.values)
    assert after.table() == metrics.table()

    more = ContinualMetrics([*loaders, held_out(4)])
    more.load_state_dict(metrics.state_dict())
    assert torch.equal(more.values[:3, :3], metrics.values)
    assert more.values[3].isnan().all()
    with pytest.warns(UserWarning, match="Add loaders at the end only"):
        ContinualMetrics({"a": held_out(1)}).load_state_dict(metrics.state_dict())


def by_loss(outputs, labels):
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


class MeanLoss(Metric):
    """The same, streamed."""

    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, outputs, labels):
        self.sums += torch.stack([by_loss(outputs, labels).sum(), torch.tensor(float(len(labels)))])

    def compute(self):
        return self.sums[0] / self.sums[1]


class Planted(Callback):
    """Weights of a head that set the loss of every task by hand, before the task is measured."""

    def __init__(self, model, tables):
        self.model, self.tables = model, iter(tables)

    def on_train_end(self, trainer, pl_module):
        pl_module.table = next(self.tables)


class Told(Learner):
    """Returns what a table says of a task, which its inputs name."""

    table = None

    def forward(self, x):
        if self.table is None:
            return super().forward(x)
        return torch.tensor(self.table)[x[:, 0].long()].unsqueeze(1)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_signs_of_a_hand_matrix(mode):
    """[[.9, .1], [.6, .8]] as accuracies, and as losses: a task forgets where its loss rises."""

    def loader(task):
        return DataLoader(TensorDataset(torch.full((4, WIDTH), float(task)), torch.zeros(4)), batch_size=4)

    def value(outputs, labels):
        return outputs[:, 0]

    model, keeper = Told(), PointKeeper()
    metrics = ContinualMetrics([loader(0), loader(1)], metric=value, mode=mode)
    metrics._baseline = torch.tensor([0.05, 0.05])
    metrics.forward_transfer = True
    tables = [[0.9, 0.1], [0.6, 0.8]]
    for seed, table in enumerate(tables):
        planted = Planted(model, [table])
        model.table = None
        trainer = learn(model, [planted, metrics, keeper], (seed + 1,), max_epochs=1)
    torch.testing.assert_close(metrics.values, torch.tensor(tables))
    sign = 1 if mode == "max" else -1
    expected = {"accuracy": 0.7, "learning_accuracy": 0.85, "backward_transfer": -0.3 * sign, "forgetting": 0.3 * sign}
    for name, number in expected.items():
        assert trainer.callback_metrics[f"continual/{name}"].item() == pytest.approx(number), name


def test_a_metric_that_streams_is_that_of_samples():
    """In its own mode, with a copy for every task."""
    found = []
    for metric in (by_loss, MeanLoss()):
        torch.manual_seed(0)
        metrics = ContinualMetrics(
            [held_out(seed) for seed in TASKS], 2, metric=metric, mode=None if isinstance(metric, Metric) else "min"
        )
        keeper = PointKeeper()
        learn(Learner(), [metrics, keeper], TASKS[:2])
        found.append((metrics, keeper))
    (one, points), (other, same) = found
    assert (one.mode, other.mode) == ("min", "min")
    torch.testing.assert_close(one.values, other.values, equal_nan=True)
    assert [p.key for p in points.points] == [p.key for p in same.points]
    assert [p.value for p in points.points] == pytest.approx([p.value for p in same.points], rel=1e-5, nan_ok=True)
    assert [p.n for p in points.points] == [p.n for p in same.points]
    worst = points.curve("continual/min_accuracy")[-1].value
    readings = [p.value for p in points.curve("continual/task0/accuracy")]
    assert worst == max(readings[1:])
    assert other.metric.sums.tolist() == [0.0, 0.0]


def test_every_class_after_every_task():
    model, logger = Learner(), MemoryLogger()
    metrics = ContinualMetrics([held_out(seed) for seed in TASKS], num_classes=CLASSES)
    learn(model, [metrics], TASKS, logger)
    x = torch.cat([task(seed).tensors[0] for seed in TASKS])
    y = torch.cat([task(seed).tensors[1] for seed in TASKS])
    with torch.no_grad():
        right = (model.eval()(x).argmax(dim=1) == y).float()
    expected = torch.stack([right[y == label].mean() for label in range(CLASSES)])
    torch.testing.assert_close(metrics.class_values[-1], expected)
    assert metrics.class_table().count("\n") == 4
    with pytest.warns(UserWarning, match=r"samples have labels that are none of `num_classes=2` classes"):
        learn(Learner(), [ContinualMetrics([held_out(1)], num_classes=2)], TASKS[:1])


def test_dips_are_kept_in_bounded_memory_and_marked():
    history = GapHistory(2, 1)
    for step in range(1000):
        values = torch.tensor([0.9 - 0.6 * (step == 333), torch.nan if step < 500 else 0.5])
        history.add(step, values)
    assert len(history.steps) <= 128
    assert history.steps == sorted(history.steps)
    first, second = history.marked(["a", "b"])
    assert first == "a: 0.3 at 333"
    assert second == "b: 0.5 at 500"
    assert len({b - a for a, b in pairwise(history.steps[:-1])}) == 1
    assert history.values[:, 0].min() == pytest.approx(0.3)
    assert GapHistory(1, -1).marked(["a"]) == ["a"]
    losses = GapHistory(1, -1)
    for step, value in enumerate([0.1, 4.0, 0.2]):
        losses.add(step, torch.tensor([value]))
    assert losses.marked(["a"]) == ["a: 4 at 1"]


def test_pictures_of_classes_and_of_the_gap(tmp_path):
    logger = CSVLogger(tmp_path)
    metrics = ContinualMetrics([held_out(seed) for seed in TASKS], every_n_steps=3, num_classes=CLASSES)
    learn(Learner(), [metrics], TASKS[:2], logger)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("accuracies", "class_accuracies", "stability_gap"):
        assert any(name in found and found.endswith(".png") for found in names), names
    again = ContinualMetrics([held_out(seed) for seed in TASKS], every_n_steps=3, num_classes=CLASSES)
    again.load_state_dict(metrics.state_dict())
    assert torch.equal(again.class_values.nan_to_num(), metrics.class_values.nan_to_num())
    assert again._gap.steps == metrics._gap.steps
    assert again._gap.marked(again.names) == metrics._gap.marked(metrics.names)


class Broken:
    def __iter__(self):
        yield from held_out(1)
        raise OSError("no disk")


def test_a_failing_loader_is_a_warning_and_nothing_more():
    keeper = PointKeeper()
    metrics = ContinualMetrics({"good": held_out(1), "bad": Broken()})
    with pytest.warns(UserWarning, match=r"`bad` failed and reads NaN: OSError: no disk"):
        learn(Learner(), [metrics, keeper], TASKS[:2])
    assert metrics.values[:, 1].isnan().all()
    assert not metrics.values[:, 0].isnan().any()
    point = keeper.curve("continual/bad/accuracy")[-1]
    assert (point.n, point.flag) == (0, Flag.NOT_CALLED)
    assert isnan(keeper.curve("continual/accuracy")[-1].value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"metric": lambda outputs, labels: (outputs.argmax(dim=1) == labels).float().mean()}, "one per sample"),
        ({"labels": lambda batch: None}, "say where with `labels`"),
        ({"outputs": lambda module, batch: module(batch[0])[0]}, "give another `metric`"),
    ],
)
def test_what_cannot_be_scored_is_said(kwargs, message):
    metrics = ContinualMetrics([held_out(1)], **kwargs)
    with pytest.warns(UserWarning, match=message):
        learn(Learner(), [metrics], TASKS[:1])
    assert metrics.values.isnan().all()


def test_a_metric_and_batches_of_ones_own():
    def loss(outputs, labels):
        return -torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    def turned():
        return [{"a": x, "b": y} for x, y in held_out(1)]

    metrics = ContinualMetrics(
        [turned], outputs=lambda module, batch: module(batch["a"]), labels=lambda batch: batch["b"], metric=loss
    )
    model = Learner()
    learn(model, [metrics], TASKS[:1])
    x, y = task(1).tensors
    expected = loss(model.eval()(x), y).mean().item()
    assert metrics.values.item() == pytest.approx(expected, rel=1e-5)


def test_without_forward_transfer_only_what_was_learned_is_evaluated():
    keeper = PointKeeper()
    metrics = ContinualMetrics([held_out(seed) for seed in TASKS], forward_transfer=False)
    learn(Learner(), [metrics, keeper], TASKS[:2])
    assert metrics.values.isnan().tolist() == [[False, True, True], [False, False, True], [True] * 3]
    assert metrics.baseline.isnan().all()
    assert not keeper.curve("continual/forward_transfer")


def test_ignored_labels_do_not_count():
    x, y = task(1).tensors
    some = torch.where(torch.arange(len(y)) % 2 == 0, y, -100)
    metrics = ContinualMetrics([DataLoader(TensorDataset(x, some), batch_size=20)])
    model, keeper = Learner(), PointKeeper()
    learn(model, [metrics, keeper], TASKS[:1])
    right = (model.eval()(x).argmax(dim=1) == y)[::2].float().mean().item()
    assert metrics.values.item() == pytest.approx(right)
    assert keeper.curve("continual/task0/accuracy")[-1].n == 24


def test_more_tasks_than_loaders_is_said():
    metrics = ContinualMetrics([held_out(1)])
    with pytest.warns(UserWarning, match="task 1 has ended, and `loaders` has 1"):
        learn(Learner(), [metrics], TASKS[:2])


def test_dry_run_leaves_no_trace():
    metrics, keeper = ContinualMetrics([held_out(1)]), PointKeeper()
    learn(Learner(), [metrics, keeper], TASKS[:1], fast_dev_run=True)
    assert metrics.values.isnan().all()
    assert metrics.baseline.isnan().all()
    assert metrics.task_index == 0


def test_picture_and_table(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    metrics = ContinualMetrics({"cats": held_out(1), "dogs": held_out(2)})
    logger = CSVLogger(tmp_path, name="", version="")
    learn(Learner(), [metrics], TASKS[:2], logger=logger)
    assert len(list((tmp_path / "figures/continual/accuracies").glob("*.png"))) == 2
    table = metrics.table().splitlines()
    assert table[0] == "| after | cats | dogs |"
    assert [line.split()[1] for line in table[2:]] == ["before", "cats", "dogs"]
    assert table[-1] in (tmp_path / "texts.md").read_text()


def test_module_without_forward_is_refused():
    with pytest.raises(MisconfigurationException, match="outputs=lambda"):
        Trainer(**QUIET, logger=MemoryLogger(), callbacks=[ContinualMetrics([batches()])]).fit(Toy(), batches())


def test_a_forward_of_the_module_itself_will_do():
    model = Toy()
    model.forward = lambda x: model.head(model.encoder(x))
    metrics = ContinualMetrics([[(torch.randn(4, 16), torch.zeros(4, dtype=torch.long))]])
    Trainer(**QUIET, logger=MemoryLogger(), callbacks=[metrics]).fit(model, batches())
    assert not metrics.values.isnan().any()


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ([], "empty"),
        ("abc", "list of loaders"),
        ([3], "iterables of batches"),
        ({1: [], "1": []}, "another one|of one name"),
        ({"accuracy": []}, "called 'accuracy'"),
        ({" ": []}, "no name"),
    ],
)
def test_arguments(loaders, message):
    with pytest.raises(ValueError, match=message):
        ContinualMetrics(loaders)
    with pytest.raises(ValueError, match="`every_n_steps`"):
        ContinualMetrics([[]], every_n_steps=0)


def test_values_are_handed_out_as_a_copy():
    metrics = ContinualMetrics([[], []])
    metrics.values.fill_(0.0)
    assert metrics.values.isnan().all()


def test_names_of_tasks_stay_apart_and_no_curve_is_a_folder_of_another():
    keeper, metrics = PointKeeper(), ContinualMetrics({"猫": held_out(1), "犬": held_out(2), "a/b": held_out(3)})
    learn(Learner(), [metrics, keeper], TASKS[:1])
    keys = {point.key for point in keeper.points}
    assert len({key for key in keys if key.count("/") == 2}) == 3
    assert {point.layer for point in keeper.points} == {"", "猫", "犬", "a/b"}
    assert all(key.isascii() for key in keys)
    assert not [key for key in keys if any(other.startswith(f"{key}/") for other in keys)]
