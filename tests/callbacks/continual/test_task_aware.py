"""When a task ends: with the weights that the fit leaves, and without an end to the fit."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_collapse import ContinualMixin, TaskAware, TaskBoundary, WeightPenalty
from lightning_collapse.penalties import EWC, SynapticIntelligence
from tests.continual import Counting
from tests.penalties.toys import Classifier, loader
from tests.toys import fit, weights


def distance(penalty, model):
    """Of the weights that were remembered from those that the fit has left."""
    anchors = penalty.memory["anchor"]
    return max((anchors[name] - weight).abs().max().item() for name, weight in model.named_parameters())


class Halved(Callback):
    """Puts other weights in place, as an average of them would be."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_: halve(pl_module))


def halve(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)


@pytest.mark.parametrize("make", [SynapticIntelligence, lambda: EWC(weight=1.0)])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [lambda: EMAWeightAveraging(decay=0.9), lambda: Halved("on_train_end")])
def test_callbacks_put_final_weights_in_place_first(make, order, other):
    model, penalty = Classifier(), make()
    fit(model, [WeightPenalty(penalty), other()][::order], loader(0))
    assert distance(penalty, model) == 0
    assert not {"on_train_end", "training_step"} & set(vars(model))


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_so_does_the_module(door):
    class Swaps(ContinualMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.set_penalties({} if door == "callback" else {"si": penalty})

        def on_train_end(self):
            super().on_train_end()
            halve(self)

    class Inherits(Swaps):
        pass

    for kind in (Swaps, Inherits):
        penalty = SynapticIntelligence()
        model = kind()
        fit(model, [WeightPenalty(penalty)] if door == "callback" else [], loader(0))
        assert distance(penalty, model) == 0


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_weights_that_change_later_are_told(door):
    class Lit(ContinualMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.set_penalties({} if door == "callback" else {"si": SynapticIntelligence()})

    callbacks = [WeightPenalty(SynapticIntelligence())] if door == "callback" else []
    with pytest.warns(UserWarning, match=r"not those that task 0 has ended with: encoder.0.weight and 3 others"):
        fit(Lit(), [*callbacks, Halved("on_fit_end")], loader(0))


class Averaged(torch.optim.SGD):
    """Trains `y` and hands over half of it, as schedule-free optimizers hand over an average."""

    def train(self):
        self._scale(2.0, True)

    def eval(self):
        self._scale(0.5, False)

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        return super().step(closure)

    @torch.no_grad()
    def _scale(self, factor, mode):
        for group in self.param_groups:
            if group.get("train_mode", False) != mode:
                group["train_mode"] = mode
                for weight in group["params"]:
                    weight.mul_(factor)


class ScheduleFree(Classifier):
    ends = True

    def configure_optimizers(self):
        return Averaged(self.parameters(), lr=0.1)

    def on_train_start(self):
        self.optimizers().train()

    def on_train_end(self):
        if self.ends:
            self.optimizers().eval()


def test_an_optimizer_hands_its_weights_over():
    model, penalty = ScheduleFree(), EWC(weight=1.0)
    fit(model, [WeightPenalty(penalty)], loader(0))
    assert distance(penalty, model) == 0
    model.ends = False
    with pytest.warns(UserWarning, match="optimizers into eval mode"):
        fit(model, [WeightPenalty(penalty)], loader(0))


def test_what_changes_weights_is_refused_beside_an_optimizer_that_brings_its_own_back():
    class Changing(Counting):
        changes_weights = True

    with pytest.raises(MisconfigurationException, match=r"`Changing` changes weights .* Averaged brings back those"):
        fit(ScheduleFree(), [Changing()], loader(0))


def test_a_change_by_another_that_changes_weights_is_no_surprise(recwarn):
    class Changing(Counting):
        changes_weights = True

        def end_task(self, trainer, pl_module):
            pl_module.encoder[0].weight.data.mul_(0.5)

    class Again(Changing):
        pass

    fit(Classifier(), [Changing(), Again(), Counting()], loader(0))
    assert not [warning for warning in recwarn if "have changed since" in str(warning.message)]
    with pytest.warns(UserWarning, match="`Counting`: the weights that the fit leaves"):
        fit(Classifier(), [Counting(), Changing()], loader(0))


def test_between_tasks_it_trains_on_as_if_nobody_had_looked():
    class Weights(Counting):
        def end_task(self, trainer, pl_module):
            super().end_task(trainer, pl_module)
            self.seen = weights(pl_module)

    plain, model, seen = ScheduleFree(), ScheduleFree(), Weights()
    model.load_state_dict(plain.state_dict())
    fit(plain, [], loader(0), max_epochs=2)
    fit(model, [TaskBoundary(every_n_epochs=1), seen], loader(0), max_epochs=2)
    assert all(torch.equal(mine, weights(plain)[name]) for name, mine in weights(model).items())
    assert len(seen.ends) == 2
    torch.testing.assert_close(seen.seen, weights(plain))


def test_a_task_ends_after_the_hooks_of_an_epoch_too():
    class Ends(Counting):
        def end_task(self, trainer, pl_module):
            super().end_task(trainer, pl_module)
            order.append("task")

    class Lit(Classifier):
        def on_train_epoch_end(self):
            order.append("module")

    order = []
    fit(Lit(), [TaskBoundary(at_epochs=[1]), Ends()], loader(0), max_epochs=2)
    assert order == ["module", "task", "module", "task"]


def test_what_the_end_of_a_task_raises_is_a_warning():
    class Fails(TaskAware):
        def end_task(self, trainer, pl_module):
            raise OSError("no disk")

    after = Counting()
    failing = Fails()
    with pytest.warns(UserWarning, match=r"`Fails`: the end of task 0 failed with OSError\('no disk'\)"):
        fit(Classifier(), [failing, after], loader(0))
    assert (failing.task_index, after.task_index) == (1, 1)


def test_nothing_is_left_on_the_module_by_a_fit_that_fails_at_its_end():
    class Raises(Callback):
        def on_train_end(self, trainer, pl_module):
            raise OSError("no disk")

    model, counting = Classifier(), Counting()
    with pytest.raises(OSError, match="no disk"):
        fit(model, [counting, Raises()], loader(0))
    assert "on_train_end" not in vars(model)
    assert counting.task_index == 0


def test_a_question_that_fails_ends_no_task():
    counting = Counting()
    with pytest.warns(UserWarning, match="`TaskBoundary`: `when` failed"):
        fit(Classifier(), [TaskBoundary(when=lambda trainer: 1 / 0), counting], loader(0))
    assert len(counting.ends) == 1
