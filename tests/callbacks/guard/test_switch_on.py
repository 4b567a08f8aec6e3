"""A regularizer that is raised while a verdict stands: what it rescues, how it settles, and what it leaves alone."""

from itertools import pairwise

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_collapse import AntiCollapseMixin, CollapseGuard, CollapseMonitor, Regularizer, SwitchOn
from lightning_collapse.losses import LinearWarmup, VarianceLoss, VCReg, VICReg
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, QUIET, Claims, PointKeeper, Toy, batches, fit, weights

CURVE = "guard/switch_on/variance"


class Agreeing(LightningModule):
    """Two noisy views are to agree, and nothing keeps their features apart: all rows become equal."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def training_step(self, batch, batch_idx):
        noise = torch.Generator().manual_seed(batch_idx)
        first, second = (self.encoder(batch + 0.3 * torch.randn(batch.shape, generator=noise)) for _ in range(2))
        return (first - second).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Decaying(AntiCollapseMixin, LightningModule):
    """One number is to be predicted, and weights decay: one direction is left."""

    def __init__(self, weight):
        super().__init__()
        self.encoder = nn.Linear(16, 32)
        self.head = nn.Linear(32, 1)
        self.set_regularizers({"vcreg": (weight, VCReg())})

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch)
        return (self.head(z) - batch[:, :1]).pow(2).mean() + self.anti_collapse_loss(z)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=2.0)


def watched(model, *callbacks, action="log", steps=300):
    keeper, guard = PointKeeper(), CollapseGuard(action=action)
    monitor = CollapseMonitor(["encoder"], every_n_steps=5, rows=64)
    fit(model, [*callbacks, monitor, guard, keeper], batches(steps, 64), log_every_n_steps=5)
    return guard, lambda name: [point.value for point in keeper.curve(name)]


def test_views_that_agree_on_one_point_are_rescued_and_the_twin_is_lost():
    torch.manual_seed(0)
    lost, curve = watched(Agreeing())
    spread = curve("collapse/encoder/feature_std")
    assert [verdict.kind for verdict in lost.verdicts] == ["complete_collapse"]
    assert spread[-1] < 0.01 * spread[0]
    torch.manual_seed(0)
    rescued, curve = watched(
        Agreeing(), Regularizer(VICReg(), layer="encoder"), action=["log", SwitchOn("vicreg", ramp=20, fade=150)]
    )
    rank, spread = (curve(f"collapse/encoder/{name}") for name in ("effective_rank", "feature_std"))
    assert rescued.verdicts == lost.verdicts  # and none after it
    assert rank[-1] > rank[0] / 2
    assert spread[-1] > spread[0] / 2
    shares = curve("guard/switch_on/vicreg")
    top = shares.index(max(shares))
    assert shares[top] > 0.9
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] < 0.5


def test_a_layer_left_with_one_direction_is_rescued_and_the_twin_is_lost():
    torch.manual_seed(0)
    lost, curve = watched(Decaying(0.0))
    rank = curve("collapse/encoder/effective_rank")
    assert [verdict.kind for verdict in lost.verdicts] == ["dimensional_collapse"]
    assert rank[-1] < 1.5
    torch.manual_seed(0)
    rescued, curve = watched(Decaying(3.0), action=["log", SwitchOn("vcreg", ramp=20)])
    rank = curve("collapse/encoder/effective_rank")
    assert rescued.verdicts == lost.verdicts
    assert rank[-1] > rank[0] / 2


class Plant(Callback):
    """Readings of a layer that is collapsed from a step on, for as long as the share is below what it needs."""

    def __init__(self, switch, needs, since=3):
        self.switch, self.needs, self.since = switch, needs, since
        self.shares = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step - 1
        ill = step >= self.since and self.switch.share(step) < self.needs
        values = {**HEALTHY, "feature_std": 1e-4 if ill else 1.0}
        publish(trainer, pl_module, [Point("collapse", "z", name, step, v, 64, 60.0) for name, v in values.items()])
        self.shares.append(float(trainer.callback_metrics[CURVE]))


def planted(needs, switch, steps, **kwargs):
    plant, guard = Plant(switch, needs), CollapseGuard(action=["log", switch])
    regularizer = Regularizer(VarianceLoss(), layer="encoder")
    monitor = Claims()
    model = Toy()
    fit(model, [regularizer, monitor, guard, plant], batches(steps), **kwargs)
    return plant.shares, guard, model, regularizer


@pytest.mark.parametrize("needs", [0.0, 0.2, 0.5, 0.9])
def test_it_settles(needs):
    shares, guard, _, _ = planted(needs, SwitchOn("variance", ramp=4, fade=20, times=3), 200)
    moves = [after > before for before, after in pairwise(shares) if after != before]
    turns = sum(one != other for one, other in pairwise(moves))
    assert turns <= 2 * 3
    assert bool(moves) == (needs > 0)
    assert len(guard.verdicts) <= 1 + 3
    assert len(set(shares[-40:])) == 1  # neither raised nor lowered any more
    assert shares[-1] >= needs


def test_the_ramp_and_the_way_back():
    shares, _, _, _ = planted(1.0, SwitchOn("variance", ramp=4, fade=10, times=1), 24)
    assert shares[:9] == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0]
    assert shares[9:12] == pytest.approx([1.0, 0.9, 0.8])


def test_until_a_verdict_falls_training_is_as_without_it_and_the_weight_is_given_back():
    torch.manual_seed(0)
    _, _, model, regularizer = planted(0.0, SwitchOn("variance"), 6)
    torch.manual_seed(0)
    bare = Toy()
    fit(bare, [], batches(6))
    assert all(torch.equal(value, weights(bare)[name]) for name, value in weights(model).items())
    assert regularizer.weight == 1.0


def test_what_is_added_is_the_share_of_a_schedule():
    added = {}

    class Listen(Callback):
        def on_points(self, trainer, pl_module, points):
            added.update({point.step: point.value for point in points if point.key == "regularizer/variance/value"})

    class Constant(Toy):
        def __init__(self):
            super().__init__()
            self.encoder[2].weight.data.zero_()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    switch = SwitchOn("variance", ramp=4)
    regularizer = Regularizer(VarianceLoss(), layer="encoder", weight=LinearWarmup(2.0, steps=10))
    fit(
        Constant(),
        [
            regularizer,
            Claims(),
            CollapseGuard(action=switch),
            Plant(switch, 1.0),
            Listen(),
        ],
        batches(8),
        log_every_n_steps=1,
    )
    full = added[7] / (0.75 * 1.4)  # raised at step 4
    assert [added[step] for step in (4, 5, 6)] == pytest.approx([0.0, 0.25 * full, 0.5 * 1.2 * full])
    assert full > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the one that saved is not needed again
def test_a_resumed_fit_is_bit_equal(tmp_path):
    def run(epochs, *callbacks, **kwargs):
        torch.manual_seed(0)
        model, switch = Toy(), SwitchOn("variance", ramp=6, fade=8)
        plant, guard = Plant(switch, 0.7), CollapseGuard(action=["log", switch])
        regularizer = Regularizer(VarianceLoss(), layer="encoder")
        monitor = Claims()
        options = {**QUIET, "max_epochs": epochs, "logger": False, "enable_checkpointing": bool(callbacks)}
        trainer = Trainer(**options, callbacks=[regularizer, monitor, guard, plant, *callbacks])
        trainer.fit(model, batches(8), **kwargs)
        return weights(model), plant.shares

    whole, shares = run(4)
    run(2, ModelCheckpoint(tmp_path, filename="half"))
    resumed, later = run(4, ckpt_path=tmp_path / "half.ckpt")
    assert later == shares[16:]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert 0 < shares[15] < 1


def test_an_unknown_name_lists_those_there_are():
    callbacks = [CollapseMonitor(), Regularizer(VICReg(), layer="encoder"), CollapseGuard(action=SwitchOn("visreg"))]
    with pytest.raises(MisconfigurationException, match=r"finds no regularizer of that name; there is 'vicreg'"):
        fit(Agreeing(), callbacks)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"ramp": 0}, "`ramp` must be at least 1, got 0"),
        ({"fade": 0}, "`fade` must be at least 1, got 0"),
        ({"times": 0}, "`times` must be at least 1, got 0"),
        ({"kinds": ["collapse"]}, r"`kinds` takes a list out of .*complete_collapse.*, got \['collapse'\]"),
        ({"kinds": "complete_collapse"}, "got 'complete_collapse'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        SwitchOn("vicreg", **arguments)
