"""A sample of the fault campaign, and that the campaign sees what it looks for; ``make faults`` runs the whole."""

import random
import warnings
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from tests.faults import fit as fitting
from tests.faults.campaign import one
from tests.faults.setting import Setting, draw
from tests.faults.trial import run, shrink

PLAIN = Setting(batches=3, epochs=1)


@pytest.fixture(autouse=True)
def _quiet():
    """Faults make torch and Lightning talk; what is said in our name is counted in the trial."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(5, 50))  # the fifth alone would take as long as ten others
def test_watched_ends_as_bare(seed):
    trial = one(seed)
    assert not trial.failures, f"python -m tests.faults --only {seed}\n{trial.setting}"


def test_a_seed_is_a_setting():
    assert draw(3) == draw(3) != draw(4)


def test_a_compiled_step_logs_whether_or_not_it_is_compiled_once_more():
    """Watching has it compiled anew, so that Dynamo gives up later than in a bare fit."""
    setting = replace(PLAIN, compiled="whole", logs=True, legs="watched later", stop_at=2)
    setting = replace(setting, watchers=(("GradientMonitor", {}), ("CollapseMonitor", {"every_n_steps": 1})))
    with torch._dynamo.config.patch(recompile_limit=2):
        assert "loss" in fitting.fit(setting, False).facts["metrics"]
        assert not run(setting).failures


class Offender(Callback):
    """Does something that a watcher must not."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_end(self, trainer, pl_module, *args):
        layer = pl_module.middle
        if self.kind == "weights":
            layer.weight.data[0, 0] += 1e-7
        elif self.kind == "torch":
            torch.rand(1)
        elif self.kind == "python":
            random.random()
        elif self.kind == "hook":
            layer.register_forward_hook(print)
        elif self.kind == "attribute":
            layer.ours = 1
        elif self.kind == "mode":
            layer.eval()
        elif self.kind == "raises":
            raise ValueError("ours")
        elif self.kind == "grad mode":
            torch.set_grad_enabled(False)
        elif self.kind == "state":
            trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


OFFENCES = {
    "weights": "weight middle.weight",
    "torch": "random state of torch",
    "python": "random state of python",
    "hook": "hooks of middle",
    "attribute": "attributes of middle",
    "mode": "mode of middle",
    "raises": "end",
    "grad mode": "global grad mode",
    "state": "optimizer 0",
}


@pytest.mark.parametrize("kind", OFFENCES)
def test_an_offence_is_seen(kind, monkeypatch):
    monkeypatch.setattr(fitting, "build", lambda watchers, case, mapping: [Offender(kind)])
    with torch.enable_grad():
        trial = run(PLAIN)
    assert any(failure.startswith(OFFENCES[kind]) for failure in trial.failures), trial.failures


def test_a_failure_shrinks_to_what_causes_it(monkeypatch):
    monkeypatch.setattr(fitting, "build", lambda watchers, case, mapping: [Offender("hook")] if watchers else [])
    setting = replace(PLAIN, body="gru", accumulate=2, logs=True, watchers=(("First", {}), ("Second", {})))
    found = shrink(run(setting)).setting
    assert (len(found.watchers), found.body, found.accumulate, found.logs) == (1, "mlp", 1, False)


def test_an_interrupt_comes_in_the_training_and_not_in_a_pass_of_a_watcher():
    """Which runs the step that is interrupted, one ahead."""
    watchers = (("FeatureLearningMonitor", {"every_n_steps": 1}),)
    trial = run(replace(PLAIN, faults=(("forward_fails", 3, "interrupt"),), watchers=watchers))
    assert trial.end.startswith("SystemExit")
    assert trial.points
    assert not trial.failures
