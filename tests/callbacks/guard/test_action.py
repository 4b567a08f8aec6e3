"""Actions of one's own, and what happens to those that fail."""

import pytest
from lightning.pytorch import Callback

from lightning_collapse import CollapseGuard
from lightning_collapse.callbacks import Action
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Point
from tests.toys import HEALTHY, Claims, Toy, batches, fit

LOW = {"effective_rank": 1.02, "eigenvalue_effective_rank": 1.0}
SCRIPT = [{}] * 4 + [LOW] * 3 + [{}] * 3


class Planted(Callback):
    """Readings of a layer, one point per step."""

    def __init__(self, script):
        self.script = script

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {**HEALTHY, **self.script[batch_idx]}
        points = [Point("collapse", "z", name, batch_idx, value, 64, 60.0) for name, value in values.items()]
        publish(trainer, pl_module, points)


def guarded(action, script=SCRIPT, guard=None, **kwargs):
    guard = guard or CollapseGuard(action=action, **kwargs)
    trainer = fit(Toy(), [Claims(), guard, Planted(script)], batches(len(script)))
    return guard, trainer


class Diary:
    """All six methods, and no subclass of ours."""

    def __init__(self, name=""):
        self.name, self.lines, self.count = name, [], 0

    def attach(self, trainer, pl_module, dirpath):
        self.lines.append(("attach", dirpath))

    def on_points(self, trainer, pl_module, judgement):
        self.count += 1

    def on_verdict(self, trainer, pl_module, judgement):
        self.lines.append((judgement.new[0].kind, judgement.step, self.count))

    def detach(self):
        self.lines.append("detach")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


def test_an_action_of_ones_own_is_called_in_turn():
    diary = Diary()
    guarded(diary, dirpath="here")
    assert diary.lines == [("attach", "here"), ("dimensional_collapse", 5, 6), "detach"]
    assert diary.count == 10


def test_a_subclass_writes_only_what_it_needs():
    class Once(Action):
        steps: tuple = ()

        def on_verdict(self, trainer, pl_module, judgement):
            self.steps += (judgement.step,)

    once = Once()
    guarded(["log", once])
    assert once.steps == (5,)


def test_states_are_told_apart_by_name_and_a_fresh_fit_begins_anew():
    first, second = Diary("first"), Diary("second")
    guard, _ = guarded([first, second])
    again = CollapseGuard(action=[Diary("second"), "warn", Diary("first"), Diary("third")])
    second.count = 3
    again.load_state_dict(guard.state_dict())
    assert [getattr(action, "count", None) for action in again._actions] == [3, None, 10, 0]
    guarded(None, guard=guard)
    assert (first.count, second.count) == (10, 10)  # not 20


def test_training_that_was_turned_back_is_judged_anew():
    class Back(Action):
        def on_verdict(self, trainer, pl_module, judgement):
            return True

    guard, _ = guarded(["log", Back()], [{}] * 4 + [LOW] * 6)
    assert [verdict.step for verdict in guard.verdicts] == [5, 7, 9]


@pytest.mark.parametrize("method", ["on_points", "on_verdict"])
def test_an_action_that_raises_is_left_out_with_one_warning(method):
    class Broken(Diary):
        calls = 0

        def fail(self, *args):
            self.calls += 1
            raise RuntimeError("no idea")

    setattr(Broken, method, Broken.fail)
    broken, called = Broken(), []
    script = [*SCRIPT, *[{}] * 3, *[LOW] * 3]
    with pytest.warns(UserWarning, match="`CollapseGuard`: action `Broken` failed with RuntimeError") as said:
        guard, trainer = guarded([broken, lambda trainer, module, verdict: called.append(verdict)], script)
    assert sum("failed with" in str(warning.message) for warning in said) == 1
    assert broken.calls == 1
    assert "detach" in broken.lines
    assert trainer.global_step == len(script)
    assert called == guard.verdicts
    assert len(called) == 2


def test_a_callable_that_raises_does_not_end_the_run_and_a_fresh_fit_calls_it_again():
    calls = []

    def broken(trainer, pl_module, verdict):
        calls.append(verdict)
        raise ValueError("no idea")

    guard = CollapseGuard(action=broken)
    for _ in range(2):
        with pytest.warns(UserWarning, match="action `.*broken.*` failed with ValueError"):
            _, trainer = guarded(None, guard=guard)
        assert trainer.global_step == len(SCRIPT)
    assert len(calls) == 2


def test_what_attach_raises_ends_the_fit_before_it_begins():
    class Refusing(Action):
        def attach(self, trainer, pl_module, dirpath):
            raise ValueError("not here")

    with pytest.raises(ValueError, match="not here"):
        guarded(Refusing())
