"""Module hooks that belong to one module: neither its copies nor its pickles take them along."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from threading import local
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.private_torch import is_hook_table, never_compile

# private in torch 2.5
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
_STATE, _COPY = "__getstate__", "__deepcopy__"


class _Running(local):
    """Whether a :class:`ModuleHook` runs in this thread: what it computes is none of the model's calls."""

    hook = False


RUNNING = _Running()


class OwnedAttribute:
    """Base of an attribute ``name`` of one module; in copies it is what was there ``before``, ``None`` for nothing."""

    name: str
    before: Any


def own(module: nn.Module) -> None:
    """Have copies and pickles of a module leave out its :class:`ModuleHook` and :class:`OwnedAttribute`.

    Both ask an object for its state by ``__getstate__``, which an instance may have of its own. Classes with a
    ``__deepcopy__``, such as those of parametrized modules, are asked for the copy, and what it has of ours is taken
    out; classes that pickle by other rules keep them.
    """
    cls, mine = type(module), vars(module)
    if cls.__reduce_ex__ is object.__reduce_ex__:
        mine.setdefault(_STATE, _State(module))
    if hasattr(cls, _COPY):
        mine.setdefault(_COPY, _Copy(module))


def disown(module: nn.Module) -> None:
    """Have the module copied as its class has it, unless something owned is still there."""
    mine = vars(module)
    hooks = [hook for name, table in mine.items() if is_hook_table(name) for hook in table.values()]
    owned = any(isinstance(value, ModuleHook | OwnedAttribute) for value in (*mine.values(), *hooks))
    for name in () if owned else (_STATE, _COPY):
        if isinstance(mine.get(name), _Asked):
            del mine[name]


class ModuleHook:
    """A forward hook or pre-hook; a function or subclasses say what it does, and it never changes what it sees.

    Copies and pickles of the module are without it. Where its class pickles by rules of its own, a pickle has a
    function of the standard library that does nothing, so that it loads where this package is not installed. Programs
    that are exported do not see it.

    Args:
        module: Where to hook.
        before: Whether to hook the inputs: :meth:`run` gets ``args`` and ``kwargs`` instead of ``args`` and ``output``.
        function: What :meth:`run` calls.

    Raises:
        Exception: What ``module`` raises if it refuses hooks, as ``torch.jit.ScriptModule`` may.

    Example:
        >>> from copy import deepcopy
        >>> seen, layer = [], nn.Identity()
        >>> hook = ModuleHook(layer, function=lambda module, args, output: seen.append(output))
        >>> layer(1), deepcopy(layer)(2), seen, len(deepcopy(layer)._forward_hooks)
        (1, 2, [1], 0)
    """

    def __init__(self, module: nn.Module, before: bool = False, function: Callable[..., None] | None = None) -> None:
        self._module, self._before, self._function = ref(module), before, function
        self._handle: RemovableHandle | None = None
        self.attach()

    def attach(self) -> None:
        """Put the hook on, again after :meth:`remove`."""
        module = self._module()
        if module is not None:
            self._handle = (
                module.register_forward_pre_hook(self, with_kwargs=True)
                if self._before
                else module.register_forward_hook(self)
            )
            own(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """What the hook does with the arguments of a call and its output, or its keyword arguments."""
        if self._function is not None:
            self._function(module, args, value)

    def remove(self) -> None:
        """Take the hook off; may be called twice."""
        module = self._module()
        if module is not None and self._handle is not None:
            self._handle.remove()
            disown(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Run, but for an export."""
        if _is_exporting():
            return
        if torch.compiler.is_compiling():
            self.run(module, args, value)
            return
        was, RUNNING.hook = RUNNING.hook, True
        try:
            self.run(module, args, value)
        finally:
            RUNNING.hook = was

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return ModuleHook(nn.Identity())  # of a module that is gone by now

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (nullcontext(), "__exit__")  # takes any three arguments, and returns nothing


# a layer that is called between two graphs runs as it is written, and under a transform nothing else would do
never_compile(ModuleHook.__call__, recursive=True)


class HookOwner:
    """Has hooks, which can be taken off for a while: torch has faster ways through a module without any."""

    _hooks: Sequence[ModuleHook] = ()

    def pause(self) -> None:
        """Take the hooks off until :meth:`resume`."""
        for hook in self._hooks:
            hook.remove()

    def resume(self) -> None:
        """Put the hooks on again."""
        for hook in self._hooks:
            hook.attach()

    def remove(self) -> None:
        """Take the hooks off for good; may be called twice."""
        self.pause()
        self._hooks = ()


class _Asked:
    """What a module is asked by copies, in place of its class."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)


class _State(_Asked):
    """The state of a module without what is owned."""

    def __call__(self) -> Any:
        module = self._module()
        return _without(getattr(type(module), _STATE, vars)(module))  # before Python 3.11 few classes have one


class _Copy(_Asked):
    """A deep copy of a module, made by its class, without what is owned."""

    def __call__(self, memo: dict[int, Any]) -> Any:
        module: Any = self._module()
        twin = type(module).__deepcopy__(module, memo)
        clean, mine = _without(vars(twin)), vars(module)
        for name in mine.keys() - _without(mine).keys():
            clean.pop(name, None)
        vars(twin).clear()
        vars(twin).update(clean)
        return twin


def _without(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    clean = {name: value for name, value in state.items() if not isinstance(value, _Asked)}
    for name, value in state.items():
        while isinstance(value, OwnedAttribute) and value.name == name:
            value = clean[name] = value.before
            if value is None:
                del clean[name]
    tables = {name: table for name, table in clean.items() if is_hook_table(name)}
    keys = {key for table in tables.values() for key, hook in table.items() if isinstance(hook, ModuleHook)}
    for name, table in tables.items():
        if not keys.isdisjoint(table):
            clean[name] = OrderedDict((key, hook) for key, hook in table.items() if key not in keys)
    return clean
