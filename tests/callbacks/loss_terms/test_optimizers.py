"""Optimizers that evaluate the loss several times a step, take sparse gradients, or skip a step."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import AntiCollapseMixin, ContinualMixin, Regularizer, WeightPenalty
from lightning_collapse.losses import CorInfoMax, SIGReg, VICReg
from lightning_collapse.losses.support.state import remembered
from lightning_collapse.penalties import L2SP, L2Init, RWalk, SynapticIntelligence
from tests.integration.siamese import Single
from tests.penalties.toys import Classifier, flat, loader
from tests.toys import PointKeeper, fit


class Banana(ContinualMixin, LightningModule):
    """A valley whose floor is bent: a line search that is told another function stops elsewhere."""

    def __init__(self, penalty=None):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([-1.0, 1.5]))
        self.set_penalties({} if penalty is None else {"inside": penalty})

    def training_step(self, batch, batch_idx):
        return (1 - self.w[0]) ** 2 + 20 * (self.w[1] - self.w[0] ** 2) ** 2

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=10, line_search_fn="strong_wolfe")


class ByHand(Banana):
    def __init__(self, penalty=None):
        super().__init__(penalty)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step(lambda: super().training_step(batch, batch_idx))


def test_a_line_search_sees_the_penalty():
    found = []
    for door in ("callback", "mixin"):
        penalty, keeper = L2SP(2.0, new_weight=0.0), PointKeeper()
        model = Banana(penalty if door == "mixin" else None)
        start = model.w.detach().clone()
        callbacks = [WeightPenalty(penalty, name="inside")] if door == "callback" else []
        fit(model, [*callbacks, keeper], max_epochs=4, log_every_n_steps=1)
        total = Banana.training_step(model, None, 0) + (model.w - start).square().sum()
        assert total.item() == pytest.approx(3.95, abs=1e-3)
        (gradient,) = torch.autograd.grad(total, model.w)
        assert gradient.abs().max() < 1e-2
        found.append((model.w, [point.value for point in keeper.curve("penalty/inside/value")]))
        assert "training_step" not in vars(model)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 24


def test_one_that_is_stepped_by_hand_is_refused():
    with pytest.raises(MisconfigurationException, match="LBFGS compares losses"):
        fit(ByHand(), [WeightPenalty(L2Init())])


@pytest.mark.parametrize("order", [1, -1])
def test_evaluations_of_a_step_are_one_step_of_a_path(order):
    """Two seen side by side, with the gradient where a step sets out and the way to where it ends."""

    class Path(SynapticIntelligence):
        def observe(self, parameters, scale=None):
            seen.append((parameters["w"].detach().clone(), parameters["w"].grad.clone()))
            super().observe(parameters, scale)

        def after_step(self, parameters):
            ends.append(parameters["w"].detach().clone())
            super().after_step(parameters)

    seen, ends, path = [], [], Path(weight=0.0)
    model = Banana()
    fit(model, [WeightPenalty(path, name="path"), WeightPenalty(L2Init(0.1))][::order], max_steps=3)
    assert len(seen) == len(ends) == 3
    way = sum(gradient * (start - end) for (start, gradient), end in zip(seen, ends, strict=True))
    moved = (seen[0][0] - ends[-1]).square() + path.damping
    torch.testing.assert_close(path.memory["importance"]["w"], way.clamp_min(0) / moved)


class Searching(Single):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=6, line_search_fn="strong_wolfe")


class MixedSearching(AntiCollapseMixin, Searching):
    def __init__(self, loss):
        super().__init__()
        self.set_regularizers({"it": loss})

    def training_step(self, batch):
        rows = self.projector(self.encoder(batch))
        return rows.square().mean() + self.anti_collapse_loss(*rows.chunk(self.regularizers["it"][1].views))


@pytest.mark.parametrize("make", [SIGReg, CorInfoMax, VICReg])
def test_a_regularizer_is_one_function_within_a_step(make):
    """Of the evaluations of a step the last one is remembered; both doors go the same way."""
    found, values = [], []

    class Counted(make):
        def terms(self, *views):
            before = remembered(self)
            values.append({key: None if kept is None else kept.clone() for key, kept in before.items()})
            return super().terms(*views)

    for door in ("callback", "mixin"):
        torch.manual_seed(0)
        values.clear()
        loss = Counted()
        model = MixedSearching(loss) if door == "mixin" else Searching()
        outside = [Regularizer(loss, layer="projector", chunk=loss.views, name="it")] if door == "callback" else []
        fit(model, outside, max_epochs=1)
        assert len(values) > 6
        if make is SIGReg:
            assert loss.step == 6
            assert sorted({int(kept["step"]) for kept in values}) == list(range(6))
        found.append((flat(model), remembered(loss)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


class Words(LightningModule):
    def __init__(self, sparse=True, optimizer=torch.optim.SGD):
        super().__init__()
        self.table, self.optimizer = nn.Embedding(40, 4, sparse=sparse), optimizer

    def training_step(self, batch, batch_idx):
        return self.table(batch).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


@pytest.fixture
def ids():
    return DataLoader(torch.randint(40, (32, 3), generator=torch.Generator().manual_seed(0)), batch_size=8)


@pytest.mark.parametrize("make", [lambda: L2Init(1.0), lambda: SynapticIntelligence(1.0)])
def test_sparse_gradients_are_penalized_as_dense_ones(ids, make):
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model, keeper = Words(sparse), PointKeeper()
        for _ in range(2):
            fit(model, [WeightPenalty(make(), name="it"), keeper], ids, log_every_n_steps=1)
        found.append((model.table.weight, [(point.key, point.value) for point in keeper.points]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert dict(found[0][1]) == pytest.approx(dict(found[1][1]), rel=1e-5)


def test_one_that_takes_sparse_gradients_alone_is_refused_by_name(ids):
    with pytest.raises(MisconfigurationException, match=r"SparseAdam takes sparse gradients alone.*`parameters=\["):
        fit(Words(optimizer=torch.optim.SparseAdam), [WeightPenalty(L2Init(1.0))], ids)


class Overflowing(Classifier):
    """The gradient of its second batch is not finite."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)


def test_a_step_that_the_gradient_scaler_skips_is_none():
    """Three batches of which one is skipped: a window of three steps stays open with two in it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    penalty = RWalk(every_n_steps=3)
    steps = []

    class Watched(WeightPenalty):
        def on_train_end(self, trainer, pl_module):
            steps.append(dict(self.penalty.state_dict()["steps"]))
            super().on_train_end(trainer, pl_module)

    fit(
        Overflowing(),
        [Watched(penalty)],
        loader(0),
        max_steps=3,
        limit_train_batches=3,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    assert set(steps[0].values()) == {2}
