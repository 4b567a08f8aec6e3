"""Rows that are no numbers: a failure where training suffers from them, none where the model masks them."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard, CollapseMonitor, Rollback, VariancePropagationMonitor
from lightning_collapse.callbacks import Monitor
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import ManualToy, PointKeeper, Toy, batches, fit


class Mark(torch.nn.Module):
    """Writes NaN where padding was."""

    def forward(self, z):
        return z.masked_fill((torch.arange(len(z)) % 4 == 0)[:, None], float("nan"))


class Padded(Toy):
    """Its encoder returns NaN for padding, which the loss leaves out."""

    def __init__(self):
        super().__init__()
        self.encoder.append(Mark())

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch)
        return self.head(z[torch.arange(len(z)) % 4 != 0]).pow(2).mean()


class ManualPadded(ManualToy):
    """The same by hand, with a backward pass that nobody hears of."""

    def __init__(self):
        super().__init__()
        self.encoder.append(Mark())

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        Padded.training_step(self, batch, batch_idx).backward()
        optimizer.step()


class Failing(Padded):
    """Has a weight that nothing depends on, and an infinite loss with finite gradients if that is what fails."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def configure_optimizers(self):
        return torch.optim.SGD([*self.encoder.parameters(), *self.head.parameters()], lr=0.01)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + float("inf") if self.what == "loss" and batch_idx >= 3 else loss


def watched(model, action="log", n=12, **kwargs):
    guard, keeper = CollapseGuard(action=action, **kwargs), PointKeeper()
    trainer = fit(model, [CollapseMonitor(["encoder"], every_n_steps=1), guard, keeper], batches(n))
    return guard, keeper, trainer


@pytest.mark.parametrize("model", [Padded, ManualPadded])
def test_rows_that_are_masked_are_no_failure(model, tmp_path):
    guard, keeper, trainer = watched(model(), ["log", Rollback(every_n_steps=1, keep=1)], dirpath=str(tmp_path))
    fractions = {point.value for point in keeper.curve("collapse/encoder/nonfinite_fraction")}
    assert fractions == {0.25}
    assert guard.verdicts == []
    assert trainer.global_step == 12
    [file] = tmp_path.iterdir()
    assert torch.load(file, weights_only=False)["global_step"] == 12  # and health is remembered


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_rows_are_a_failure_where_training_suffers(what):
    class Poison(Callback):
        def on_after_backward(self, trainer, pl_module):
            if what == "gradient" and trainer.global_step >= 3:
                pl_module.unused.grad = torch.full((2,), float("nan"))  # of a weight that does not follow it

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if what == "weight" and trainer.global_step == 3:
                pl_module.unused.data[0] = float("inf")

    guard = CollapseGuard(action="log")
    fit(Failing(what), [Poison(), CollapseMonitor(["encoder"], every_n_steps=1), guard], batches(8))
    assert [verdict.kind for verdict in guard.verdicts] == ["non_finite"]
    assert guard.verdicts[0].since == 3


class Dormant(Callback):
    """Points of a reader's own, of a family whose rules do not ask for the loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        publish(trainer, pl_module, [Point("plasticity", "z", "dormant_fraction", batch_idx, 0.0, 64)])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_all_points_of_a_step_are_judged_with_the_loss(place):
    callbacks = [CollapseMonitor(["encoder"], every_n_steps=1), guard := CollapseGuard(action="log")]
    callbacks.insert(place, Dormant())
    fit(Toy(), callbacks, batches(6))
    curves = {tuple(entry["curve"]): entry["state"] for entry in guard.state_dict()["judge"]["history"]}
    loss = curves["training", "collapse", "loss"]
    assert loss["steps"] == list(range(6))
    assert len(set(loss["values"])) == 6


class Frequent(Monitor):
    """Draws a curve that no rule reads."""

    def start(self, trainer, pl_module):
        pass

    def points(self, step, numbers):
        return [Point("frequent", "z", "zero", step, 0.0)]


def test_how_often_others_are_read_changes_nothing_of_what_a_rule_knows():
    known = []
    for others in ([], [Frequent(every_n_steps=1)], [VariancePropagationMonitor(every_n_steps=4)]):
        torch.manual_seed(0)
        guard = CollapseGuard(action="log")
        fit(Toy(), [CollapseMonitor(["encoder"], every_n_steps=4), *others, guard], batches(16))
        state = guard.state_dict()["judge"]
        loss = {tuple(entry["curve"]): entry["state"] for entry in state["history"]}["training", "collapse", "loss"]
        assert state["planned"].get("propagation", 5) == state["planned"]["collapse"] == 5
        known.append((loss["steps"], loss["values"], state["planned"]["collapse"]))
    assert known[0][0] == [0, 3, 7, 11, 15]
    for other in known[1:]:
        assert other[::2] == known[0][::2]
        assert other[1] == pytest.approx(known[0][1], rel=1e-12)
