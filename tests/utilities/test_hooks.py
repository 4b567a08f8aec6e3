"""Copies of a watched module are as if nobody watched, at once, whatever way they are made."""

import copy
import io
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_collapse import (
    AttentionEntropyMonitor,
    CollapseMonitor,
    Distillation,
    Regularizer,
    Replay,
    SpectralAlignmentMonitor,
    WeightPenalty,
)
from lightning_collapse.losses import VarianceLoss
from lightning_collapse.penalties import L2Init
from lightning_collapse.replay import ReplayBuffer
from lightning_collapse.utilities.hooks import ModuleHook
from lightning_collapse.utilities.training_step import wrap_method, wrap_training_step
from tests.toys import Toy, fit


def saved(module):
    torch.save(module, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


HOW = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
    "copy of a copy": lambda module: pickle.loads(pickle.dumps(copy.deepcopy(module))),
}
each_way = pytest.mark.parametrize("how", HOW)


def attributes(module):
    """Names of all attributes of all parts, and how many entries the tables of hooks have."""
    return [
        {name: len(value) if "hook" in name and isinstance(value, dict) else 0 for name, value in vars(part).items()}
        for part in module.modules()
    ]


def hooked(layer, seen):
    return [
        ModuleHook(layer, function=lambda *args: seen.append("after")),
        ModuleHook(layer, before=True, function=lambda *args: seen.append("before")),
    ]


WATCHERS = {
    "collapse": lambda: CollapseMonitor(every_n_steps=2),
    "alignment": lambda: SpectralAlignmentMonitor(every_n_steps=2),
    "attention": lambda: AttentionEntropyMonitor(layers={"encoder": lambda module, args, kwargs: None}),
    "regularizer": lambda: Regularizer(VarianceLoss(), layer="encoder"),
    "penalty": lambda: WeightPenalty(L2Init(weight=1.0)),
    "distillation": lambda: Distillation(layer="encoder"),
    "replay": lambda: Replay(ReplayBuffer(8)),
}


@each_way
@pytest.mark.parametrize("name", WATCHERS)
@pytest.mark.filterwarnings("ignore:.*AttentionEntropyMonitor")
def test_a_copy_of_a_watched_module_carries_nothing(name, how):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            twin = HOW[how](pl_module)
            found.append(attributes(twin)[: 1 if how == "copy" else None])  # a shallow copy shares the other parts

    found, bare = [], Toy()
    fit(bare, [Copies()])
    wanted, watched = list(found), Toy()
    found.clear()
    fit(watched, [WATCHERS[name](), Copies()])
    assert found == wanted
    assert attributes(watched) == attributes(bare)


@each_way
def test_what_others_have_hooked_is_copied_as_ever(how):
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_hook(print_nothing)
    hooks = hooked(layer, seen)
    twin = HOW[how](layer)
    assert list(twin._forward_hooks.values()) == [print_nothing]
    assert not twin._forward_pre_hooks
    twin(torch.zeros(1, 2))
    assert seen == []
    layer(torch.zeros(1, 2))
    assert seen == ["before", "after"]
    for hook in hooks:
        hook.remove()
    assert attributes(layer) == attributes(twin)


def print_nothing(*args):
    """A hook that can be pickled."""


class StateOfItsOwn(nn.Linear):
    def __getstate__(self):
        return {**vars(self), "copied": True}


@each_way
def test_a_class_with_a_state_of_its_own(how):
    layer = StateOfItsOwn(2, 2)
    layer.extra, seen = "kept", []
    bare = attributes(HOW[how](layer))
    hooked(layer, seen)
    twin = HOW[how](layer)
    assert (attributes(twin), twin.extra) == (bare, "kept")
    twin(torch.zeros(1, 2))
    assert seen == []


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin


def parametrized(inputs, outputs):
    return nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs))


@pytest.mark.parametrize("make", [CopiesItself, parametrized])
def test_classes_that_copy_themselves(make):
    layer, seen = make(2, 2), []
    bare = attributes(layer)
    hooks = hooked(layer, seen)
    take_off = wrap_method(layer, "forward", lambda forward, *args: forward(*args))
    for twin in (copy.deepcopy(layer), copy.deepcopy(nn.Sequential(layer))[0], copy.deepcopy(copy.deepcopy(layer))):
        assert attributes(twin) == bare
        assert torch.equal(twin(torch.ones(1, 2)), layer(torch.ones(1, 2)))
    assert seen == ["before", "after"] * 3
    for take in (take_off, *(hook.remove for hook in hooks)):
        take()
    assert attributes(layer) == bare


def test_hooks_and_wrapper_may_come_off_in_any_order():
    module = Toy()
    bare = attributes(module)
    parts = [ModuleHook(module).remove, wrap_training_step(module, lambda step, *args: step(*args))]
    for order in (parts, parts[::-1]):
        again = [ModuleHook(module).remove, wrap_training_step(module, lambda step, *args: step(*args))]
        for take_off in (*order, *again, *again):
            take_off()
            assert "__getstate__" not in vars(copy.deepcopy(module))
    assert attributes(module) == bare


def test_a_copied_owner_can_take_off_what_it_does_not_have():
    hook = ModuleHook(nn.Identity())
    twin = copy.deepcopy(hook)
    twin.remove()
    twin.attach()
    twin.remove()
