"""Listeners of torch's functions: in any order, each by itself, aside where asked, and none left."""

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode, has_torch_function

from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.utilities.hooks import ModuleHook


class Heard:
    """Names of the calls; raises at one of them."""

    def __init__(self, bad=None):
        self.names, self.errors, self.bad = [], [], bad

    def note(self, func, args, kwargs, output):
        torch.zeros(1).cos()  # what a listener calls is heard by none
        if func.__name__ == self.bad:
            raise ValueError(self.bad)
        self.names.append(func.__name__)

    def fail(self, error):
        self.errors.append(str(error))


def is_listening():
    return has_torch_function((torch.zeros(1),))


def test_listeners_come_and_go_in_any_order():
    first, second, x = Heard(), Heard(), torch.zeros(2)
    FUNCTION_CALLS.add(first)
    x.exp()
    FUNCTION_CALLS.add(second)
    x.sin()
    FUNCTION_CALLS.remove(first)
    x.tan()
    FUNCTION_CALLS.remove(second)
    FUNCTION_CALLS.remove(second)
    x.abs()
    assert (first.names, second.names) == (["exp", "sin"], ["sin", "tan"])
    assert not is_listening()


def test_what_one_raises_ends_neither_the_call_nor_the_others():
    bad, good, x = Heard("sin"), Heard(), torch.zeros(2)
    for listener in (bad, good):
        FUNCTION_CALLS.add(listener)
    result = x.sin()
    x.exp()
    for listener in (bad, good):
        FUNCTION_CALLS.remove(listener)
    assert torch.equal(result, x)
    assert (bad.names, bad.errors) == (["exp"], ["sin"])
    assert good.names == ["sin", "exp"]


def test_they_stand_aside_unless_another_mode_is_inside():
    heard, x = Heard(), torch.zeros(2)
    assert not FUNCTION_CALLS.stand_aside()
    FUNCTION_CALLS.add(heard)
    with TorchFunctionMode():
        assert not FUNCTION_CALLS.stand_aside()
    assert FUNCTION_CALLS.stand_aside()
    assert not is_listening()
    assert not FUNCTION_CALLS.stand_aside()
    x.exp()
    FUNCTION_CALLS.come_back()
    x.sin()
    FUNCTION_CALLS.remove(heard)
    FUNCTION_CALLS.come_back()
    assert heard.names == ["sin"]
    assert not is_listening()


def test_each_thread_has_its_own():
    heard = Heard()
    FUNCTION_CALLS.add(heard)
    thread = threading.Thread(target=lambda: torch.zeros(2).exp())
    thread.start()
    thread.join()
    FUNCTION_CALLS.remove(heard)
    assert "exp" not in heard.names


def test_what_a_hook_of_ours_computes_is_none_of_the_models_calls():
    heard, layer, x = Heard(), torch.nn.Tanh(), torch.zeros(2)
    outer = torch.nn.Sequential(layer)
    hooks = [
        ModuleHook(layer, function=lambda module, args, output: output.exp()),
        ModuleHook(outer, before=True, function=lambda module, args, kwargs: layer(args[0]).sin()),  # a hook in a hook
        ModuleHook(outer, function=lambda module, args, output: 1 / 0),
    ]
    FUNCTION_CALLS.add(heard)
    with pytest.raises(ZeroDivisionError):
        outer(x)
    x.tan()
    FUNCTION_CALLS.remove(heard)
    for hook in hooks:
        hook.remove()
    assert heard.names == ["tanh", "tan"]
