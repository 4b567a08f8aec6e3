"""What is added to a loss from outside stays outside of copies, keeps NaN out, and never ends a run."""

import io
import pickle
from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import AntiCollapseMixin, ContinualMetrics, Distillation, Regularizer, WeightPenalty
from lightning_collapse.losses import AntiCollapseLoss, CorInfoMax, VarianceLoss, VCReg
from lightning_collapse.penalties import L2Init
from tests.continual import Learner, held_out, training
from tests.penalties.toys import Classifier, flat, loader
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
]


class Copies(Callback):
    """Copies the module in every way, in mid-training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pickled = pickle.dumps(pl_module)
        torch.save(pl_module, io.BytesIO())
        self.copies = [deepcopy(pl_module), pickle.loads(self.pickled)]


AROUND = [
    lambda: Regularizer(VarianceLoss(), layer="encoder"),
    lambda: Regularizer(VCReg(), layer="encoder.0"),
    lambda: Distillation(layer="encoder"),
]


@pytest.mark.parametrize("make", AROUND)
def test_copies_carry_nothing_of_ours(make):
    model, copies = Toy(), Copies()
    fit(model, [make(), copies])
    assert b"lightning_collapse" not in copies.pickled
    batch, grown = torch.randn(4, 16), flat(model)
    for copy in copies.copies:
        assert copy.training_step.__self__ is copy
        copy.training_step(batch, 0).backward()
        assert all(weight.grad is not None for weight in copy.parameters())
        fit(copy)  # on its own
    assert torch.equal(flat(model), grown)


def test_a_teacher_made_of_the_regularized_layer_adds_no_rows():
    class Byol(Toy):
        def on_train_start(self):
            self.teacher = deepcopy(self.encoder)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.teacher(batch).square().mean()

    class Rows(VarianceLoss):
        def terms(self, *views):
            rows.append(len(views[0]))
            return super().terms(*views)

    rows = []
    fit(Byol(), [Regularizer(Rows(), layer="encoder")])
    assert rows == [32] * 6


class Masked(Toy):
    """Three rows of its encoder are NaN in chosen batches, and none of them enters the loss."""

    def __init__(self, chosen=lambda i: True):
        super().__init__()
        self.chosen, self.holes = chosen, nn.Identity()

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        bad = torch.zeros(len(batch), 1, dtype=torch.bool)
        bad[: 3 if self.chosen(batch_idx) else 0] = True
        holes = self.holes(torch.where(bad, torch.nan, features))
        return self.head(torch.where(bad, 0.0, holes)).square().mean()


class Kept(Masked):
    """The same, with the term written out in the batches that have it."""

    def __init__(self, chosen, counts):
        super().__init__(chosen)
        self.counts = counts

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        cut = 3 if self.chosen(batch_idx) else 0
        value = self.head(torch.cat([torch.zeros_like(features[:cut]), features[cut:]])).square().mean()
        return value + VarianceLoss()(features[cut:]) if self.counts(batch_idx) else value


@pytest.mark.filterwarnings("ignore:`Regularizer.layer='holes'.`. rows of the layer are NaN")
@pytest.mark.parametrize(
    ("chosen", "counts", "points"),
    [
        (lambda i: True, lambda i: i > 0, [6, 6, 6]),  # from the second step on the rows alone are left out
        (lambda i: i > 0, lambda i: i != 1, [3, 6, 6]),  # later: once a logging step has shown them, here the second
    ],
)
def test_rows_that_are_not_finite_are_left_out(chosen, counts, points):
    found, keeper = [], PointKeeper()
    for model, callbacks in (
        (Masked(chosen), [Regularizer(VarianceLoss(), layer="holes"), keeper]),
        (Kept(chosen, counts), []),
    ):
        model.load_state_dict(start)
        fit(model, callbacks, log_every_n_steps=2)
        found.append(flat(model))
    torch.testing.assert_close(*found)
    assert [point.value for point in keeper.curve("regularizer/variance/nonfinite_rows")] == points


torch.manual_seed(0)
start = Toy().state_dict()


@pytest.mark.filterwarnings("ignore:`Regularizer.layer='holes'.`. rows of the layer are NaN")
def test_a_resumed_run_knows_of_such_rows(tmp_path):
    whole, half, rest = Masked(), Masked(), Masked()
    for model in (whole, half):
        model.load_state_dict(start)
    fit(whole, [Regularizer(VarianceLoss(), layer="holes")], max_epochs=2)
    first = fit(half, [Regularizer(VarianceLoss(), layer="holes")])
    first.save_checkpoint(tmp_path / "half.ckpt")
    last = Trainer(
        **{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[Regularizer(VarianceLoss(), layer="holes")]
    )
    last.fit(rest, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(flat(rest), flat(whole))


def test_it_is_said_once():
    with pytest.warns(UserWarning, match=r"rows of the layer are NaN.*`regularizer/variance/nonfinite_rows`") as told:
        fit(Masked(), [Regularizer(VarianceLoss(), layer="holes")], log_every_n_steps=1)
    assert sum("are NaN" in str(warning.message) for warning in told) == 1


@pytest.mark.filterwarnings("ignore:`Regularizer.layer='holes'.`. rows of the layer are NaN")
@pytest.mark.parametrize("first", [0, 2])
def test_a_step_without_the_term_leaves_no_trace_in_the_loss(first):
    """In its running statistics: one batch has such rows, or is left out."""
    states, data = [], list(batches(4))
    for chosen, rows in ((lambda i: i == first, data), (lambda i: False, data[:first] + data[first + 1 :])):
        loss, model = CorInfoMax(), Masked(chosen)
        model.load_state_dict(start)
        model.optimizer_step = lambda *args, **kwargs: kwargs.get("optimizer_closure", args[-1])()
        fit(model, [Regularizer(loss, layer="holes", chunk=2)], DataLoader(torch.cat(rows), 32), log_every_n_steps=99)
        states.append((loss.means, loss.covariances))
    torch.testing.assert_close(*states)
    assert states[0][1].isfinite().all()


def test_distillation_leaves_them_out_too():
    class Student(Classifier):
        def forward(self, x):
            logits = super().forward(x)
            hole = torch.arange(len(x)).unsqueeze(1) == 0
            return logits.masked_fill(hole, torch.nan) if self.training else logits

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self(x)[1:], y[1:])

    model, keeper, distillation = Student(), PointKeeper(), Distillation()
    fit(model, [distillation, keeper], loader(0), log_every_n_steps=1)
    with pytest.warns(UserWarning, match="rows of the layer are NaN"):
        fit(model, [distillation, keeper], loader(1), log_every_n_steps=1)
    assert flat(model).isfinite().all()
    assert all(point.value == 1 for point in keeper.curve("regularizer/distillation/nonfinite_rows"))
    assert keeper.curve("regularizer/distillation/divergence")[-1].value > 0


class Failing(AntiCollapseLoss):
    """Works once."""

    coefficients = {"it": 1.0}  # noqa: RUF012
    calls = 0

    def terms(self, *views):
        self.calls += 1
        if self.calls > 1:
            raise OSError("no disk")
        return {"it": views[0].square().mean()}


def test_what_the_loss_raises_later_is_a_warning():
    model = Toy()
    with pytest.warns(UserWarning, match=r"`Regularizer\(name='failing'\)`: its term failed with OSError.*go without"):
        fit(model, [Regularizer(Failing(), layer="encoder")])
    assert flat(model).isfinite().all()
    assert not any(part._forward_hooks for part in model.modules())
    spent = Failing()
    spent.calls = 1
    with pytest.raises(OSError, match="no disk"):
        fit(Toy(), [Regularizer(spent, layer="encoder")])


@pytest.mark.parametrize("at", [0, 3])
def test_outputs_that_cannot_be_read(at):
    """At the first step an error with the cause, later a warning; never an exception in the middle of a forward."""

    class Sparse(Toy):
        def __init__(self):
            super().__init__()
            self.odd = nn.Identity()

        def training_step(self, batch, batch_idx):
            features = self.encoder(batch)
            self.odd(features.view(32, 2, 4).to_sparse() if batch_idx == at else features)
            return self.head(features).square().mean()

    if at:
        with pytest.warns(UserWarning, match=r"the layer returned none.*go without the term"):
            fit(Sparse(), [Regularizer(VarianceLoss(), layer="odd")])
    else:
        with pytest.raises(
            MisconfigurationException, match=r"layer='odd'.*needs a floating-point tensor.*returned none"
        ):
            fit(Sparse(), [Regularizer(VarianceLoss(), layer="odd")])


class Broken(MemoryLogger):
    def log_metrics(self, metrics, step=None):
        raise OSError("no disk")


class Mixed(AntiCollapseMixin, Toy):
    def __init__(self):
        super().__init__()
        self.set_regularizers({"variance": VarianceLoss()})

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        return self.head(features).square().mean() + self.anti_collapse_loss(features)


@pytest.mark.filterwarnings("ignore:.*no disk")
@pytest.mark.parametrize(
    ("model", "callbacks"),
    [
        (Toy, lambda: [Regularizer(VarianceLoss(), layer="encoder"), WeightPenalty(L2Init())]),
        (Mixed, list),
    ],
)
def test_a_logger_that_fails_ends_nothing(model, callbacks):
    trainer = fit(model(), callbacks(), logger=Broken(), log_every_n_steps=1)
    assert trainer.global_step == 6


@pytest.mark.parametrize("watch", ["on_train_epoch_end", "validation"])
@pytest.mark.parametrize(
    ("make", "callbacks", "curve"),
    [
        (Toy, lambda: [Regularizer(VarianceLoss(), layer="encoder")], "regularizer/variance/value"),
        (Toy, lambda: [WeightPenalty(L2Init())], "penalty/l2init/value"),
        (Mixed, list, "regularizer/variance/variance"),
    ],
)
def test_early_stopping_and_checkpoints_work_from_the_first_epoch_on(make, callbacks, curve, watch, tmp_path):
    """Epochs shorter than the logging interval, and validation in mid-epoch."""
    mid = {"limit_val_batches": 1, "val_check_interval": 2} if watch == "validation" else {}
    stop = EarlyStopping(curve, patience=50, mode="min")
    best = ModelCheckpoint(tmp_path, monitor=curve, mode="min")
    model = make()
    model.val_dataloader = batches
    trainer = fit(model, [*callbacks(), stop, best], max_epochs=2, enable_checkpointing=True, **mid)
    assert trainer.global_step == 12
    assert stop.best_score.isfinite()
    assert best.best_model_path


def test_what_early_stopping_reads_is_fresh():
    seen = []

    class Reads(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["regularizer/variance/value"].item())

    fit(Toy(), [Regularizer(VarianceLoss(), layer="encoder"), Reads()], max_epochs=3)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("watcher", [EarlyStopping, ModelCheckpoint])
def test_curves_that_begin_when_a_task_ends_cannot_be_waited_for(watcher, tmp_path):
    options = {"dirpath": tmp_path} if watcher is ModelCheckpoint else {}
    with pytest.raises(MisconfigurationException, match=rf"{watcher.__name__}\(monitor='continual/accuracy'\).*begins"):
        fit(
            Learner(),
            [ContinualMetrics([held_out(1)]), watcher(monitor="continual/accuracy", **options)],
            training(1),
            enable_checkpointing=True,
        )


def test_curves_that_go_on_can():
    metrics = ContinualMetrics([held_out(1), held_out(2)], every_n_steps=4)
    model = Learner()
    fit(model, [metrics], training(1))
    stop = EarlyStopping("continual/task0/accuracy", mode="max", patience=9)
    fit(model, [metrics, stop], training(2), max_epochs=2)
    assert stop.best_score.isfinite()
