"""What the graph of a loss tells: roles of the batch's tensors, the task, and the layer compared with the targets."""

import gc
import logging
import weakref

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard
from lightning_collapse.monitoring import CallRecord, read_loss
from tests.monitoring import density_cases  # noqa: F401
from tests.monitoring.loss_cases import ROWS, C, Net, X, Y
from tests.toys import Claims, fit

pytestmark = pytest.mark.filterwarnings("ignore:`.*Monitor`. the fit ended before")  # monitors that only claim


class Lit(LightningModule):
    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.step = Net(), step

    def training_step(self, batch, batch_idx):
        return self.step(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def read(net, step, batch):
    record = CallRecord(net)
    record.armed = True
    loss = step(net, batch)
    record.armed = False
    use = read_loss(loss, batch, record)
    record.clear()
    return use


@pytest.mark.parametrize("name", ROWS)
def test_the_table(name):
    step, batch, task, directions, outputs, roles = ROWS[name]
    torch.manual_seed(0)
    use = read(Net(), step, batch)
    assert use.task == task, use.why
    assert dict(use.roles) == roles
    assert set(use.compared) == outputs
    assert use.directions == directions
    assert use.why


@pytest.mark.parametrize("name", ROWS)
def test_the_table_in_a_trainer(name):
    step, batch, task, directions, outputs, _ = ROWS[name]
    guard = CollapseGuard(action="log")
    lit = Lit(step)
    fit(lit, [Claims(), guard], DataLoader([batch, batch], batch_size=None))
    assert (guard.task.name, guard.task.directions) == (task, directions)
    assert guard.task.outputs == {f"net.{layer}" for layer in outputs}
    bare = Lit(step)
    fit(bare, [], DataLoader([batch, batch], batch_size=None))
    assert all(torch.equal(one, other) for one, other in zip(lit.parameters(), bare.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lit.modules())


def guarded(step, batch=(X, Y), **kwargs):
    guard = CollapseGuard(action="log")
    fit(Lit(step), [Claims(), guard], DataLoader([batch, batch], batch_size=None), **kwargs)
    return guard.task


def classify(net, batch):
    return cross_entropy(net.scores(batch[0]), batch[1])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    task = guarded(classify, precision=precision, accumulate_grad_batches=2)
    assert (task.name, task.directions, task.outputs) == ("classification", C - 1, {"net.head"})
    assert task.last == {"net.head", "net.head.input", "net.body", "net.body.2", "net.body.3"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_are_not_run_again(reentrant):
    net, calls = Net(), []
    net.body[0].register_forward_hook(lambda *_: calls.append(0))

    def step(net, batch):
        x = batch[0].clone().requires_grad_()
        return cross_entropy(net.head(checkpoint(net.body, x, use_reentrant=reentrant)), batch[1])

    state = torch.get_rng_state()
    use = read(net, step, (X, Y))
    assert (use.task, use.compared, len(calls)) == ("classification", ("head",), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_compiled_steps_are_unknown_and_compiled_parts_are_not(caplog):
    def part(net, batch):
        return cross_entropy(torch.compile(net.head, backend="aot_eager")(net.features(batch[0])), batch[1])

    assert read(Net(), part, (X, Y)).task == "classification"
    whole = torch.compile(classify, backend="aot_eager")
    with caplog.at_level(logging.INFO):
        assert guarded(whole).outputs == set()
    assert "does not know the task: a part of the loss cannot be looked into (CompiledFunctionBackward" in caplog.text
    guard = CollapseGuard(action="log")
    fit(Lit(whole), [Claims("neural_collapse"), guard], DataLoader([(X, Y)], batch_size=None))
    assert guard.task.name == "classification"


class Manual(Lit):
    """Two losses in a step."""

    def __init__(self):
        super().__init__(None)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for loss in (classify, lambda net, batch: mse_loss(net.one(net.features(batch[0])), batch[0][:, :1])):
            optimizer.zero_grad()
            self.manual_backward(loss(self.net, batch))
            optimizer.step()


class Late(Lit):
    """The first batches bring no loss."""

    def __init__(self, first):
        super().__init__(classify)
        self.first = first

    def training_step(self, batch, batch_idx):
        return None if batch_idx < self.first else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(("lit", "name"), [(Manual(), "classification"), (Late(2), "classification"), (Late(9), "")])
def test_the_first_loss_counts(lit, name):
    guard = CollapseGuard(action="log")
    fit(lit, [Claims(), guard], DataLoader([(X, Y)] * 6, batch_size=None))
    assert guard.task.name == name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lit.modules())
    assert "training_step" not in vars(lit)


class Mark:
    """Lives as long as the node that has it."""


def test_no_graph_outlives_the_backward_pass():
    marks = []

    def step(net, batch):
        scores = net.scores(batch[0])
        mark = Mark()
        scores.grad_fn.metadata["mark"] = mark
        marks.append(weakref.ref(mark))
        return cross_entropy(scores, batch[1])

    class Looks(Lit):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            gc.collect()
            assert all(mark() is None for mark in marks)

    guard = CollapseGuard(action="log")
    fit(Looks(step), [Claims(), guard], DataLoader([(X, Y)] * 2, batch_size=None))
    assert len(marks) == 2
    assert guard.task.name == "classification"


def test_what_fails_is_contained(monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("lightning_collapse.callbacks.loss_reader.read_loss", fail)
    with pytest.warns(UserWarning, match="CollapseGuard.*reading the loss.*broken"):
        assert guarded(classify).name == ""


class Head(nn.Module):
    """What may stand between the last features and the loss."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4).requires_grad_(kind != "frozen")
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.head)
        if kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.head)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        h = self.body(x)
        h = self.norm(h) if self.kind == "norm" else h
        if self.kind == "residual":
            h = h + torch.tanh(self.norm(h))
        scores = self.head(h)
        return self.scale * scores if self.kind == "scale" else scores


@pytest.mark.parametrize("kind", ["plain", "norm", "frozen", "residual", "scale", "weight norm", "spectral norm"])
def test_only_the_last_layer_is_compared(kind):
    use = read(Head(kind), lambda net, batch: cross_entropy(net(batch[0]), batch[1]), (X, Y))
    assert (use.task, use.directions, use.compared) == ("classification", 3, ("head",))
    assert {"head.input", "body.2", "body"} <= set(use.last)
    assert "body.0" not in use.last


def test_features_that_are_fewer_than_classes():
    net = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 4))
    use = read(net, lambda net, batch: cross_entropy(net(batch[0]), batch[1]), (X, Y))
    assert use.directions == 2


class WithLoss(nn.Module):
    """A model that is given its targets, and returns its loss."""

    def __init__(self, criterion):
        super().__init__()
        self.net, self.criterion = Net(), criterion

    def forward(self, x, y):
        return self.criterion(self.net.decoder(self.net.features(x)), y)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), mse_loss])
def test_targets_that_the_model_is_given_are_no_inputs(criterion):
    def step(wrapped, batch):
        return wrapped[0](*batch)

    of_others = read(nn.Sequential(WithLoss(criterion)), step, (X, X.roll(1, 0)))
    assert (of_others.task, of_others.roles) == ("regression", {"0": "input", "1": "target"})
    of_itself = read(nn.Sequential(WithLoss(criterion)), step, (X, X))
    assert (of_itself.task, of_itself.roles["0"]) == ("reconstruction", "own target")
