"""Forward hook that belongs to one module: neither its deep copies nor its pickles take it along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_collapse.utilities.private_torch import drop_forward_hook

# private in torch 2.5
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


class ModuleHook:
    """A forward hook or pre-hook; subclasses say in :meth:`run` what it does, and never change what they see.

    A deep copy of the module gets a hook that does nothing, and takes itself off at the copy's first call. A pickle
    gets a function of the standard library that does nothing, so that it loads where this package is not installed.
    Programs that are exported do not see it.

    Args:
        module: Where to hook.
        before: Whether to hook the inputs: :meth:`run` gets ``args`` and ``kwargs`` instead of ``args`` and ``output``.

    Raises:
        Exception: What ``module`` raises if it refuses hooks, as ``torch.jit.ScriptModule`` may.

    Example:
        >>> from copy import deepcopy
        >>> class Shout(ModuleHook):
        ...     def run(self, module, args, output):
        ...         print("called")
        >>> layer = nn.Identity()
        >>> hook = Shout(layer)
        >>> _, copied = layer(1), deepcopy(layer)(1)
        called
    """

    def __init__(self, module: nn.Module, before: bool = False) -> None:
        self._live, self._before, self._module = True, before, ref(module)
        self.attach()

    def attach(self) -> None:
        """Put the hook on, again after :meth:`remove`."""
        module = self._module()
        if module is not None:
            self._handle: RemovableHandle = (
                module.register_forward_pre_hook(self, with_kwargs=True)
                if self._before
                else module.register_forward_hook(self)
            )

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """What the hook does with the arguments of a call and its output, or its keyword arguments."""

    def remove(self) -> None:
        """Take the hook off; may be called twice."""
        self._handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Run, or leave if this is a copy."""
        if self._live:
            if not _is_exporting():
                self.run(module, args, value)
        elif not torch.compiler.is_compiling():
            self._leave(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        copy = object.__new__(ModuleHook)
        copy._live = False
        return copy

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (nullcontext(), "__exit__")  # takes any three arguments, and returns nothing

    def _leave(self, module: nn.Module) -> None:
        drop_forward_hook(module, self)


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
