"""Gradient projection in real fits: tasks in sequence, every kind of optimization, resuming, curves and bad input."""

import copy
import logging
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import Projection, TaskBoundary
from lightning_collapse.projections import GPM, OGD, SGP, HebbianSubspace, NullSpace
from tests.penalties.toys import Classifier, Manual, loader
from tests.toys import QUIET, MemoryLogger, PointKeeper


def fit(model, callbacks, data, ckpt_path=None, **kwargs):
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": callbacks, **kwargs})
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def made(kind=Classifier, **options):
    torch.manual_seed(0)
    return kind(**options)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def narrow(seed, rank=2, n=48, dtype=torch.float32):
    """A task whose inputs lie in a plane of their own."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=dtype))[0][:rank]
    x = torch.randn(n, rank, generator=generator, dtype=dtype) @ plane
    return DataLoader(TensorDataset(x, torch.randint(3, (n,), generator=generator)), 8)


class Permuted(Classifier):
    def __init__(self, width=40):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.05)


def permuted(seed, n=192):
    """Three classes around means that eight numbers of twenty-four tell apart, in another order for each task."""
    generator = torch.Generator().manual_seed(0)
    means, y = 2 * torch.randn(3, 8, generator=generator), torch.arange(n) % 3
    x = torch.cat([means[y] + 0.3 * torch.randn(n, 8, generator=generator), torch.zeros(n, 16)], dim=1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x[:, order], y), 16)


def accuracy(model, data):
    x, y = data.dataset.tensors
    with torch.no_grad():
        return (model.eval()(x).argmax(dim=1) == y).float().mean().item()


def test_old_permutations_are_kept_where_doing_nothing_forgets():
    tasks, transfer, new = [permuted(seed) for seed in range(3)], {}, {}
    for name, callbacks in (("nothing", []), ("gpm", [Projection()])):
        model, first = made(Permuted), []
        for data in tasks:
            fit(model, callbacks, data, max_epochs=6)
            first.append(accuracy(model, data))
        last = [accuracy(model, data) for data in tasks]
        transfer[name] = sum(b - a for a, b in zip(first[:2], last[:2], strict=True)) / 2
        new[name] = first[-1]
    assert transfer["nothing"] < -0.2
    assert transfer["gpm"] > -0.02
    assert new["gpm"] > 0.9


@pytest.mark.parametrize("kind", [Classifier, Manual])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_of_the_second_task_leave_the_inputs_of_the_first_alone(kind, accumulate):
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": accumulate} if kind is Classifier else {}
    model, projection = made(kind).double(), Projection(GPM(1.0))
    first, second = narrow(0, dtype=torch.float64), narrow(1, rank=6, dtype=torch.float64)
    fit(model, [projection], first, **options)
    x, before = first.dataset.tensors[0], copy.deepcopy(model)
    fit(model, [projection], second, **options)
    moved = model.encoder[0].weight - before.encoder[0].weight
    assert moved.norm() > 1e-3
    assert (moved @ x.T).abs().max() < 1e-12
    assert torch.equal(model.head.bias, before.head.bias)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)


class Overflows(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.batch_idx == 3:
            pl_module.head.weight.grad.fill_(torch.inf)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_scaler_that_leaves_an_update_out():
    model, projection = made(), Projection(GPM(1 - 1e-9))
    for data in (narrow(0), loader(1)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        before = copy.deepcopy(model)
        fit(model, [projection, Overflows()], data, plugins=[plugin])
    x = narrow(0).dataset.tensors[0]
    moved = model.encoder[0].weight - before.encoder[0].weight
    assert moved.norm() > 0.01
    assert ((moved @ x.T).norm() / (moved.norm() * x.norm())) < 1e-5


@pytest.mark.parametrize("method", [GPM, SGP, lambda: HebbianSubspace(2), lambda: OGD(n_samples=4)])
def test_the_first_task_and_all_random_numbers_are_untouched(method):
    alone, watched = made(), made()
    states = []
    for model, callbacks in ((alone, []), (watched, [Projection(method())])):
        torch.manual_seed(1)
        fit(model, callbacks, DataLoader(loader(0).dataset, 8, shuffle=True))
        states.append(torch.get_rng_state())
    assert torch.equal(flat(alone), flat(watched))
    assert torch.equal(*states)
    assert callbacks[0].method.learned == 1
    assert not callbacks[0].method.parameters
    assert not any(module._forward_hooks for module in watched.modules())
    assert pickle.loads(pickle.dumps(callbacks[0])).method.readings() == callbacks[0].method.readings()


class Killed(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 0:
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("method", [lambda: SGP(0.9), NullSpace, lambda: OGD(n_samples=4)])
def test_resumed_in_mid_task_it_is_bit_by_bit_the_same(method, tmp_path):
    """Tasks end after two epochs; the checkpoint is of the third, the momentum from before."""
    whole, projection = made(), Projection(method())
    fit(whole, [projection, TaskBoundary(at_epochs=[2])], loader(0), max_epochs=4)
    half, first = made(), Projection(method())
    trainer = fit(half, [first, TaskBoundary(at_epochs=[2])], loader(0), max_epochs=3, fast_dev_run=False)
    assert first.task_index == 2
    saved = made()

    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    fit(saved, [Projection(method()), TaskBoundary(at_epochs=[2]), Saves()], loader(0), max_epochs=3)
    resumed, again = made(), Projection(method())
    fit(resumed, [again, TaskBoundary(at_epochs=[2])], loader(0), tmp_path / "mid.ckpt", max_epochs=4)
    assert torch.equal(flat(resumed), flat(whole))
    states = [callback.state_dict() for callback in (again, projection)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert "method" in trainer.callback_metrics or set(whole.state_dict()) == set(Classifier().state_dict())


def test_capacity_is_published_when_a_task_ends_and_the_start_says_what_it_takes(caplog):
    keeper, logger = PointKeeper(), MemoryLogger()
    with caplog.at_level(logging.INFO, logger="lightning_utilities.core.rank_zero"):
        projection = Projection(GPM(1.0), layers=["encoder"])
        fit(made(), [projection, keeper], narrow(0), logger=logger)
    [point] = keeper.curve("continual/encoder.0/capacity_left")
    assert (point.value, point.step) == (pytest.approx(4 / 6), 6)
    assert logger.curve("continual/encoder.0/rank") == [(6, 2.0)]
    assert "1 parameters are projected from the second task on, and frozen are encoder.0.bias" in caplog.text
    assert "MiB at most" in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.compile")
def test_compiled_it_learns_and_projects_the_same():
    found = []
    for compiled in (False, True):
        model, projection = made(), Projection(GPM(0.9))
        for index in (0, 1):
            fit(torch.compile(model, backend="eager") if compiled else model, [projection], loader(index))
        found.append((flat(model), projection.state_dict()["method"]))
    torch.testing.assert_close(*found)


def test_a_layer_that_saw_nothing_and_a_loader_that_fails_are_told():
    class Unused(Classifier):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.warns(UserWarning, match="`spare` saw no finite inputs"):
        fit(made(Unused), [Projection()], loader(0))

    def broken():
        raise OSError("no such file")

    projection = Projection(loader=broken)
    with pytest.warns(UserWarning, match=r"end of task 0 failed with OSError.*Training goes on"):
        fit(made(), [projection], loader(0))
    assert projection.method.learned == 0


class ScheduleFree(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.train = optimizer.eval = lambda: None
        return optimizer


def test_bad_input_is_refused_when_the_fit_starts():
    for make, match in (
        (lambda: Projection("gpm"), "`method` takes an object"),
        (lambda: Projection(layers="encoder"), "`layers` takes a list"),
        (lambda: Projection(outputs=3), "`outputs` takes a function"),
        (lambda: Projection(loader="data"), "`loader` takes an iterable"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    for kind, callbacks, match in (
        (Classifier, [Projection(layers=["neck"])], "matches no submodule"),
        (ScheduleFree, [Projection()], "hands over others"),
        (Manual, [Projection(OGD())], "2 optimizers"),
        (
            Classifier,
            [Projection(), EarlyStopping("continual/head/capacity_left")],
            "waits for a curve of `Projection`",
        ),
    ):
        with pytest.raises(MisconfigurationException, match=match):
            fit(made(kind), callbacks, loader(0))
    with pytest.raises(MisconfigurationException, match=r"kept in torch.bfloat16.*float32"):
        fit(made(), [Projection()], loader(0), precision="bf16-true")
    projection = Projection()
    fit(made(), [projection], loader(0))
    wider = made()
    wider.encoder[0] = nn.Linear(9, 8)
    with pytest.raises(MisconfigurationException, match="receives 9 numbers, and received 6"):
        fit(wider, [projection], loader(0))
