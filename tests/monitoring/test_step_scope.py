"""Whose rows: forward passes of the training step, and no others."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_collapse import AttentionEntropyMonitor, CollapseMonitor, SpectralAlignmentMonitor
from lightning_collapse.monitoring import FeatureHooks, StepScope
from lightning_collapse.utilities.modules import Tap
from lightning_collapse.utilities.training_step import wrap_training_step
from tests.toys import ManualToy, MemoryLogger, Toy, batches, fit


class Probe(Callback):
    """Runs the model before and after every step, on what no training batch holds."""

    def probe(self, trainer, pl_module, *args, **kwargs):
        with torch.no_grad():
            pl_module.head(pl_module.encoder(1e3 + torch.zeros(64, 16)))

    on_train_batch_start = on_train_batch_end = on_before_zero_grad = on_before_backward = probe
    on_after_backward = on_before_optimizer_step = probe


class Manual(ManualToy):
    """Steps twice in a batch: two evaluations of the model are the training step's own."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


class Byol(Toy):
    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.target(batch)
        return self.head(self.encoder(batch) - target).square().mean()


class LineSearch(Toy):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def read(model, callbacks, **kwargs):
    torch.manual_seed(0)
    trainer = fit(model(), callbacks, batches(8), logger=MemoryLogger(), **kwargs)
    return trainer.logger.rows


@pytest.mark.parametrize(("model", "accumulate"), [(Toy, 1), (Toy, 2), (Manual, 1), (Byol, 2), (LineSearch, 1)])
def test_passes_of_other_callbacks_are_no_training_rows(model, accumulate):
    def watch():
        return [CollapseMonitor(["encoder*", "head:input"], every_n_steps=2), SpectralAlignmentMonitor(every_n_steps=2)]

    alone = read(model, watch(), accumulate_grad_batches=accumulate)
    for callbacks in ([Probe(), *watch()], [*watch(), Probe()]):
        rows = read(model, callbacks, accumulate_grad_batches=accumulate)
        assert [step for step, _ in rows] == [step for step, _ in alone]
        for (_, found), (_, expected) in zip(rows, alone, strict=True):
            assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("model", "calls"), [(Toy, 1), (Manual, 2), (Byol, 1), (LineSearch, 1)])
def test_how_many_rows_a_step_brings(model, calls):
    torch.manual_seed(0)
    lit, counts = model(), []
    hooks = FeatureHooks([Tap("layer", lit.encoder), *([Tap("target", lit.target)] if model is Byol else [])], limit=99)

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.scope = StepScope(pl_module)

        def on_train_batch_start(self, *args):
            self.scope.request(hooks)

        def on_train_batch_end(self, *args):
            found = hooks.pop()
            counts.append({name: (captured.returned, captured.calls) for name, captured in found.items()})

    fit(lit, [Watch()], batches(3))
    expected = {"layer": (32 * calls, (32,) * calls)} | ({"target": (32, (32,))} if model is Byol else {})
    assert counts == [expected] * 3


def test_only_what_is_requested_is_armed_and_only_once():
    class Lit(nn.Module):
        def training_step(self):
            return one.armed, two.armed

    lit, one, two = Lit(), FeatureHooks([]), FeatureHooks([])
    scope = StepScope(lit)
    assert lit.training_step() == (False, False)
    scope.request(one, two)
    assert lit.training_step() == (True, True)
    assert lit.training_step() == (False, False)
    scope.request(one)
    scope.request(two)
    assert lit.training_step() == (False, True)
    scope.request(one)
    scope.remove()
    scope.remove()
    assert lit.training_step() == (False, False)
    assert "training_step" not in vars(lit)


def test_a_step_that_fails_leaves_nothing_armed():
    class Lit(nn.Module):
        def training_step(self):
            raise ValueError

    lit, hooks = Lit(), FeatureHooks([])
    scope = StepScope(lit)
    scope.request(hooks)
    with pytest.raises(ValueError):  # noqa: PT011
        lit.training_step()
    assert not hooks.armed


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def training_step(self, batch):
        return (self.weight * batch).sum()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_the_step_of_their_own(how):
    module, seen = Steps(), []

    def around(step, batch):
        seen.append(batch)
        return step(batch)

    unwraps = [wrap_training_step(module, around) for _ in range(2)]
    copied = how(module)
    with torch.no_grad():
        copied.weight.zero_()
    assert copied.training_step(1.0) == 0
    assert seen == []
    assert module.training_step(1.0) == 2
    assert seen == [1.0, 1.0]
    assert b"lightning_collapse" not in pickle.dumps(module)
    for unwrap in unwraps:
        unwrap()
    assert "training_step" not in vars(module)


def test_attention_is_heard_in_the_step_only():
    class Attend(Toy):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def training_step(self, batch, batch_idx):
            tokens = self.encoder(batch.view(8, 4, 16))
            return self.attention(tokens, tokens, tokens)[0].square().mean()

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            pl_module.attention(*[torch.ones(3, 4, 8)] * 3)

        on_train_batch_end = on_train_batch_start

    rows = read(Attend, [AttentionEntropyMonitor(every_n_steps=2), Look()])
    assert {row["attention/attention/n"] for _, row in rows if "attention/attention/n" in row} == {32.0}
