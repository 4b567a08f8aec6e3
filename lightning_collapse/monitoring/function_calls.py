"""Torch function calls: all that a step calls of torch from Python, shown to whoever listens by one mode for all."""

from __future__ import annotations

from threading import local
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_collapse.utilities.hooks import RUNNING
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL, innermost_function_mode, never_compile


class Listener(Protocol):
    """What is shown the calls."""

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take note of a function of torch that has been called."""
        ...

    def fail(self, error: Exception) -> None:
        """Hear of what :meth:`note` has raised: the model's own call has gone well."""
        ...


class FunctionCalls(local):
    """Shows every function of torch that this thread calls from Python to its listeners, after it has been called.

    Each mode that is entered costs every call a few microseconds, so that listeners share one, which is entered while
    there are any. They come and go in any order; modes that others enter while some are there must be left before the
    last goes. What a listener itself calls is shown to none, nor is compiled code.

    Example:
        >>> class Names:
        ...     def note(self, func, args, kwargs, output):
        ...         print(func.__name__)
        ...     def fail(self, error): ...
        >>> names = Names()
        >>> FUNCTION_CALLS.add(names)
        >>> _ = torch.zeros(2).exp()
        zeros
        exp
        >>> FUNCTION_CALLS.remove(names)
        >>> _ = torch.zeros(2).exp()
    """

    def __init__(self) -> None:
        self._mode: Any = _Mode()
        self._entered = False

    def add(self, listener: Listener) -> None:
        """Show calls to a listener from now on."""
        self._mode.listeners += (listener,)
        self.come_back()

    def remove(self, listener: Listener) -> None:
        """Show it no more; may be called twice."""
        self._mode.listeners = tuple(each for each in self._mode.listeners if each is not listener)
        if self._entered and not self._mode.listeners:
            self._leave()

    def stand_aside(self) -> bool:
        """Leave the mode until :meth:`come_back`, if it was the last to be entered, and say whether it was."""
        aside = self._entered and innermost_function_mode() is self._mode
        if aside:
            self._leave()
        return aside

    def come_back(self) -> None:
        """Enter the mode, if there is a listener."""
        if not self._entered and self._mode.listeners:
            self._mode.__enter__()
            self._entered = True

    def _leave(self) -> None:
        self._entered = False
        self._mode.__exit__(None, None, None)


class _Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.listeners: tuple[Listener, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not torch.compiler.is_compiling() and not RUNNING.hook:
            _tell(self.listeners, func, args, kwargs, output)
        return output


# compiled by itself, for a call between two graphs, it may hand a `torch.dtype` back as a number (torch 2.13)
never_compile(_Mode.__torch_function__)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as are listeners
def _tell(
    listeners: tuple[Listener, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    for listener in listeners:
        try:
            listener.note(func, args, kwargs, output)
        except Exception as error:  # noqa: PERF203  (one must not keep the others from it)
            listener.fail(error)


def has_fused_layers(root: nn.Module) -> bool:
    """Whether layers in evaluation mode take another way, with other rounding, as soon as someone listens."""
    return any(isinstance(module, FUSED_IN_EVAL) and not module.training for module in root.modules())


FUNCTION_CALLS = FunctionCalls()
"""Those of the running thread."""
