"""Scalars that a module logs, as points: which, when, and a rule of a user that reads them."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard, ScalarMonitor
from lightning_collapse.rules import RULES, Rule, register_rule
from tests.toys import PointKeeper, Toy, batches, fit


class Logging(Toy):
    """Logs a perplexity in validation that doubles with every epoch, and a reward at every step."""

    def training_step(self, batch, batch_idx):
        self.log("reward", float(self.trainer.global_step), prog_bar=False)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/perplexity", 2.0**self.current_epoch)


def run(names, *callbacks, model=None, **kwargs):
    keeper = PointKeeper()
    settings = {"limit_val_batches": 2, "max_epochs": 4, "val_dataloaders": batches(2), **kwargs}
    loaders = settings.pop("val_dataloaders")
    model = model or Logging()
    model.val_dataloader = lambda: loaders
    trainer = fit(model, [ScalarMonitor(names, every_n_steps=2), *callbacks, keeper], batches(6), **settings)
    return keeper, trainer


def test_each_is_published_when_it_was_logged():
    keeper, trainer = run(["val/perplexity", "reward", "loss"])
    perplexity = [(point.layer, point.step, point.value) for point in keeper.points if point.layer == "val/perplexity"]
    assert perplexity == [("val/perplexity", 6 * epoch + 5, 2.0**epoch) for epoch in range(4)]
    reward = [(point.step, point.value) for point in keeper.points if point.layer == "reward"]
    assert reward == [(step, float(step)) for step in (0, *range(1, 24, 2))]
    loss = keeper.curve("scalars/loss/value")
    assert [point.step for point in loss] == [0, *range(1, 24, 2)]
    assert loss[0].value > loss[-1].value > 0
    assert trainer.callback_metrics["scalars/val-2f-perplexity/value"] == 8.0


def test_the_loss_is_that_of_the_step():
    class Constant(Toy):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx) + batch_idx

    keeper, _ = run(["loss"], model=Constant(), max_epochs=1)
    assert [(point.step, point.value) for point in keeper.points] == [(0, 0.0), (1, 1.0), (3, 3.0), (5, 5.0)]


def test_a_rule_of_ones_own_watches_a_perplexity():
    class PerplexityExplosion(Rule):
        """Four times its lowest."""

        kind, family, measures = "perplexity_explosion", "scalars", ("value",)
        patience = 1
        calibration = float("inf")

        def applies_to(self, layer, task):
            return layer == "val/perplexity"

        def update_baseline(self, so_far, value, count):
            return min(so_far, value)

        def severity(self, points, baseline):
            return points["value"].value / baseline["value"] / 4

        def evidence(self, points, baseline):
            return f"the perplexity is {points['value'].value:g}, and its lowest was {baseline['value']:g}"

    register_rule(PerplexityExplosion)
    try:
        guard = CollapseGuard(action="log", rules=["perplexity_explosion"])
        run(["val/perplexity", "reward"], guard)
    finally:
        del RULES["perplexity_explosion"]
    [verdict] = guard.verdicts
    assert (verdict.layer, verdict.since, verdict.step) == ("val/perplexity", 17, 17)
    assert verdict.evidence == "the perplexity is 4, and its lowest was 1"


def test_what_another_callback_puts_into_the_metrics_is_read_too():
    class Edit(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.callback_metrics["edit"] = torch.tensor(7)

    keeper = PointKeeper()
    fit(Toy(), [Edit(), ScalarMonitor(["edit"], every_n_steps=1), keeper])
    assert [(point.step, point.value) for point in keeper.points] == [(2, 7.0)]


def test_what_was_never_logged_is_said_at_the_end():
    with pytest.warns(UserWarning, match=r"nothing was logged as 'val/perplexityy'; there is .*reward"):
        run(["val/perplexityy", "loss"])


@pytest.mark.parametrize("names", ["loss", [], [3]])
def test_bad_arguments(names):
    with pytest.raises(ValueError, match="`scalars` takes a list of names of logged metrics"):
        ScalarMonitor(names)
