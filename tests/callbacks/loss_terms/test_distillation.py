"""The callback does what a training step with a teacher written out does, and leaves everything else alone."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import Distillation, Regularizer
from lightning_collapse.losses import VarianceLoss, distillation_loss, feature_distillation_loss
from tests.toys import QUIET, MemoryLogger, weights


class Net(LightningModule):
    """BatchNorm, dropout and a head, in one ``forward``."""

    def __init__(self, classes=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class WithoutForward(Net):
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.encoder(batch[0])), batch[1])


class ByHand(Net):
    """Learning without forgetting written out."""

    teacher = ()
    kind = "logits"
    weight = 1.0

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.encoder(x)
        logits = self.head(features)
        loss = cross_entropy(logits, y)
        for teacher in self.teacher:
            with torch.no_grad():
                theirs = teacher.encoder(x)
                theirs = theirs if self.kind == "features" else teacher.head(theirs)
            if self.kind == "logits":
                loss = loss + self.weight * distillation_loss(logits, theirs)
            else:
                loss = loss + self.weight * feature_distillation_loss(features, theirs)
        return loss

    def remember(self):
        self.teacher = ()
        self.teacher = (deepcopy(self).eval().requires_grad_(False),)


def task(index, n=64, size=16):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(n, 8, generator=generator)
    y = (x @ torch.randn(8, 3, generator=generator)).argmax(dim=1)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def run(model, *callbacks, index=0, ckpt_path=None, **kwargs):
    trainer = Trainer(
        **{**QUIET, "logger": MemoryLogger(), "callbacks": list(callbacks), "log_every_n_steps": 1, **kwargs}
    )
    trainer.fit(model, task(index), ckpt_path=ckpt_path)
    return trainer


def tasks(model, *callbacks, count=3, **kwargs):
    for index in range(count):
        torch.manual_seed(index)
        trainer = run(model, *callbacks, index=index, **kwargs)
        if isinstance(model, ByHand):
            model.remember()
    return trainer


def same(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pair(first=Net, second=ByHand, **attributes):
    """Two models with the same weights."""
    models = first(), second()
    models[1].load_state_dict(models[0].state_dict())
    for name, value in attributes.items():
        setattr(models[1], name, value)
    return models


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_is_learning_without_forgetting_written_out(kwargs):
    ours, theirs = pair(weight=2.0)
    plain, _ = pair()
    plain.load_state_dict(ours.state_dict())
    tasks(ours, Distillation(weight=2.0), **kwargs)
    tasks(theirs, **kwargs)
    tasks(plain, **kwargs)
    assert same(ours, theirs)
    assert not same(ours, plain)


def test_features_of_a_layer():
    ours, theirs = pair(kind="features", weight=5.0)
    tasks(ours, Distillation(layer="encoder", kind="features", weight=5.0))
    tasks(theirs)
    assert same(ours, theirs)


def test_an_operation_in_place_behind_the_layer_does_not_matter():
    class Before(ByHand):
        def training_step(self, batch, batch_idx):
            x, y = batch
            features = self.encoder[:2](x)
            loss = cross_entropy(self.head(self.encoder[2:](features.clone())), y)
            for teacher in self.teacher:
                with torch.no_grad():
                    theirs = teacher.encoder[:2](x)
                loss = loss + feature_distillation_loss(features, theirs)
            return loss

    ours, theirs = pair(second=Before)
    tasks(ours, Distillation(layer="encoder.1", kind="features"))
    tasks(theirs)
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_a_path_in_pieces_is_told_by_outputs():
    ours, theirs = pair(WithoutForward)
    tasks(ours, Distillation(layer="head", outputs=lambda module, batch: module.head(module.encoder(batch[0]))))
    tasks(theirs)
    assert same(ours, theirs)


def test_two_calls_and_keyword_arguments():
    class Twice(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return cross_entropy(self(x=x), y) + cross_entropy(self(x=-x), y)

    class TwiceByHand(ByHand):
        def training_step(self, batch, batch_idx):
            x, y = batch
            mine = [self(x), self(-x)]
            loss = cross_entropy(mine[0], y) + cross_entropy(mine[1], y)
            for teacher in self.teacher:
                with torch.no_grad():
                    theirs = [teacher(x), teacher(-x)]
                loss = loss + distillation_loss(torch.cat(mine), torch.cat(theirs))
            return loss

    ours, theirs = pair(Twice, TwiceByHand)
    tasks(ours, Distillation())
    tasks(theirs)
    assert same(ours, theirs)


class Noisy(Net):
    """Draws in eval mode too."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("make", [Net, Noisy])
def test_without_weight_nothing_changes(make):
    """Random numbers, BatchNorm statistics, ``state_dict`` and ``training_step`` are those of a plain run."""
    watched, plain = pair(make, make)
    callback = Distillation(weight=0.0)
    tasks(watched, callback)
    after = torch.rand(1)
    tasks(plain)
    assert torch.equal(after, torch.rand(1))
    assert same(watched, plain)
    assert "training_step" not in vars(watched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())


def test_the_teacher_stands_still_and_apart():
    callback = Distillation()
    model = Net()
    run(model, callback)
    teacher = callback._teacher.module
    before = weights(teacher)
    assert same(teacher, model)
    run(model, callback, index=1, max_epochs=3)
    assert callback._teacher.module is not teacher
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher._trainer is None
    assert not set(map(id, teacher.parameters())) & set(map(id, model.parameters()))
    assert list(model.state_dict()) == list(Net().state_dict())


def test_it_forgets_less():
    def drift(callbacks):
        torch.manual_seed(0)
        model = Net()
        run(model, *callbacks, max_epochs=10)
        x, y = task(0).dataset.tensors
        with torch.no_grad():
            model.eval()
            right = (model(x).argmax(dim=1) == y).float().mean()
            model.train()
            run(model, *callbacks, index=1, max_epochs=10)
            model.eval()
            return right - (model(x).argmax(dim=1) == y).float().mean()

    assert drift([Distillation(weight=5.0)]) < 0.5 * drift([])


def test_a_head_that_grows():
    callback, model = Distillation(), Net()
    run(model, callback)
    old = model.head
    model.head = nn.Linear(16, 5)
    with torch.no_grad():
        model.head.weight[:3], model.head.bias[:3] = old.weight, old.bias
    trainer = run(model, callback, index=1)
    curve = trainer.logger.curve("regularizer/distillation/value")
    assert [step for step, _ in curve] == [0, 1, 2, 3]
    assert callback._teacher.module.head.out_features == 5
    run(model, callback, index=2)


def test_curves():
    callback, model = Distillation(weight=3.0, name="lwf"), Net()
    first = run(model, callback)
    assert not any(key.startswith("regularizer") for _, row in first.logger.rows for key in row)
    trainer = run(model, callback, index=1)
    total, terms = trainer.logger.curve("regularizer/lwf/value"), trainer.logger.curve("regularizer/lwf/divergence")
    assert len(total) == 4
    for (_, value), (_, term) in zip(total, terms, strict=True):
        assert value == pytest.approx(3 * term)
        assert term > 0


@pytest.mark.parametrize("grown", [False, True])
def test_a_resumed_fit_is_the_uninterrupted_one(grown, tmp_path):
    def second_task(model, *callbacks, **kwargs):
        torch.manual_seed(5)
        return run(model, *callbacks, index=1, **kwargs)

    def grow(model):
        if grown:
            model.head = nn.Linear(16, 5)
            nn.init.constant_(model.head.weight, 0.1)
            nn.init.zeros_(model.head.bias)
        return model

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.encoder[3] = nn.Identity()  # the state of random numbers is no part of a checkpoint

    callback, model = Distillation(), Plain()
    run(model, callback)
    start = deepcopy(model.state_dict()), deepcopy(callback.state_dict())

    def begin():
        callback, model = Distillation(), Plain()
        model.load_state_dict(start[0])
        callback.load_state_dict(deepcopy(start[1]))
        return callback, grow(model)

    callback, whole = begin()
    second_task(whole, callback, max_epochs=2)
    callback, half = begin()
    second_task(half, callback, Saver(tmp_path / "half.ckpt"), max_epochs=2)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed_callback, resumed = Distillation(), grow(Plain())
    run(resumed, resumed_callback, index=1, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed, whole)
    assert resumed_callback.task_index == 2


class Saver(Callback):
    """Saves a checkpoint when the first epoch ends."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_task_may_end_within_a_fit():
    class Boundary(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                callback.finish_task(trainer, pl_module)

    callback = Distillation()
    trainer = run(Net(), callback, Boundary(), max_epochs=2)
    assert [step for step, _ in trainer.logger.curve("regularizer/distillation/value")] == [4, 5, 6, 7]
    assert callback.task_index == 2


@pytest.mark.parametrize("on", [None, "encoder.0"])
@pytest.mark.parametrize("what", ["module", "part"])
def test_compiled(what, on):
    """Behind `torch.compile` the teacher is the frozen copy too, and not the code of the student."""

    class NoDropout(Net):
        def __init__(self):
            super().__init__()
            self.encoder[3] = nn.Identity()

    ours, plain = pair(NoDropout, NoDropout)
    if what == "module":
        compiled = torch.compile(ours, backend="eager")
    else:
        ours.encoder = torch.compile(ours.encoder, backend="eager")
        compiled = ours
    tasks(compiled, Distillation(layer=on, weight=2.0), count=2)
    tasks(plain, Distillation(layer=on, weight=2.0), count=2)
    for first, second in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    torch.compiler.reset()


def test_nothing_waits_for_the_device():
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    callback, model = Distillation(), Net()
    run(model, callback)
    step, seen = callback._run, []

    def watched(*args, **kwargs):
        with NoWait():
            seen.append(step(*args, **kwargs))
        return seen[-1]

    callback._run = watched
    run(model, callback, index=1)  # also at logging steps: the callback publishes after the batch
    assert len(seen) == 4


def test_a_real_gradient_scaler():
    ours, theirs = pair()
    for model, callbacks in ((ours, [Distillation()]), (theirs, [])):
        for index in range(2):
            torch.manual_seed(index)
            scaler = torch.amp.GradScaler("cpu")
            run(model, *callbacks, index=index, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
            if model is theirs:
                model.remember()
    assert same(ours, theirs)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NeverCalled(Net):
    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.encoder(batch[0])), batch[1])


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.stream = (i for i in range(3))


@pytest.mark.parametrize(
    ("make", "callbacks", "match"),
    [
        (Manual, [Distillation()], "optimizes by hand. Add `distillation_loss"),
        (WithoutForward, [Distillation()], "WithoutForward has none. Write one and call it"),
        (NeverCalled, [Distillation()], "call its `forward` with gradient in `training_step`, and it did not"),
        (WithoutForward, [Distillation(layer="head")], "called on what other layers had computed.*outputs=lambda"),
        (Net, [Distillation(layer="tail")], "'tail' matches no submodule of Net"),
        (Net, [Distillation(layer="encoder.*")], "must name one layer, but matches 4"),
        (Net, [Distillation(), Distillation(layer="head")], "Two `Distillation`s are called 'distillation'"),
        (Net, [Distillation(name="x"), Regularizer(VarianceLoss(), layer="head", name="x")], "are called 'x'"),
        (Locked, [Distillation()], "needs a copy of Locked.*generator"),
    ],
)
def test_misuse_is_refused_before_a_task_is_trained(make, callbacks, match):
    with pytest.raises(MisconfigurationException, match=match):
        run(make(), *callbacks)


def test_a_teacher_that_knows_more_is_refused():
    callback = Distillation()
    run(Net(classes=5), callback)
    with pytest.raises(MisconfigurationException, match=r"cannot compare \(16, 3\) of the student with \(16, 5\)"):
        run(Net(classes=3), callback)


def test_a_step_without_a_call_goes_without_the_term():
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                return self.head(self.encoder(batch[0])).mean()
            return super().training_step(batch, batch_idx)

    callback, model = Distillation(), Sometimes()
    run(model, callback)
    with pytest.warns(UserWarning, match="Steps like this one go without the term"):
        trainer = run(model, callback, index=1)
    assert [step for step, _ in trainer.logger.curve("regularizer/distillation/value")] == [0, 1, 3]


@pytest.mark.parametrize(("arguments", "match"), [({"temperature": 0}, "positive, got 0"), ({"kind": "x"}, "'x'")])
def test_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Distillation(**arguments)
