"""Method wrapping: a wrapper around a method of one module, that comes off again and that no copy carries."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from lightning_collapse.utilities.hooks import OwnedAttribute, disown, own


def wrap_method(module: nn.Module, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``module.name`` by ``around(method, *args, **kwargs)`` until the returned function is called.

    Wrappers nest, and may be taken off in any order. What the instance had before comes back: the method of its class,
    or an attribute of its own, such as the compiled step of ``torch.compile(module)``. A deep copy and a pickle of the
    module have that, too, in place of the wrapper.

    Args:
        module: A ``LightningModule``.
        name: Of the method.
        around: Called with the method it replaces and the arguments of the call; returns what the method shall return.

    Returns:
        A function that takes the wrapper off; calling it again does nothing.

    Example:
        >>> class Lit(nn.Module):
        ...     def training_step(self, batch):
        ...         return batch + 1
        >>> lit = Lit()
        >>> unwrap = wrap_method(lit, "training_step", lambda step, batch: 10 * step(batch))
        >>> lit.training_step(1), deepcopy(lit).training_step(1)
        (20, 2)
        >>> unwrap()
        >>> lit.training_step(1), "training_step" in vars(lit)
        (2, False)
    """
    wrapper = _Wrapper(module, name, around)
    setattr(module, name, wrapper)
    own(module)
    return wrapper.take_off


def wrap_training_step(module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """:func:`wrap_method` of ``training_step``."""
    return wrap_method(module, "training_step", around)


@contextmanager
def silent(module: nn.Module) -> Iterator[None]:
    """Have a ``LightningModule`` log nothing."""
    unwrap = [wrap_method(module, name, lambda log, *args, **kwargs: None) for name in ("log", "log_dict")]
    try:
        yield
    finally:
        for take_off in unwrap:
            take_off()


def unwrapped(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method without the wrappers that :func:`wrap_method` has put around it.

    Example:
        >>> class Lit(nn.Module):
        ...     def training_step(self, batch):
        ...         return batch + 1
        >>> lit = Lit()
        >>> unwrap = wrap_method(lit, "training_step", lambda step, batch: 10 * step(batch))
        >>> unwrapped(lit, "training_step")(1)
        2
    """
    method: Any = getattr(module, name)
    while isinstance(method, _Wrapper):
        method = method.inner
    return method  # type: ignore[no-any-return]


class _Wrapper(OwnedAttribute):
    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.before: Any = vars(module).get(name)
        self.inner: Any = getattr(module, name)
        self.call: Callable[..., Any] = partial(around, self.inner)
        update_wrapper(self, self.inner, updated=())
        # Lightning looks one `__wrapped__` deep for the arguments of the step: show it what it would have seen
        self.__wrapped__ = getattr(self.inner, "__wrapped__", self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return deepcopy(self.before, memo)
        return MethodType(getattr(type(self.module), self.name), deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # of builtins alone, so that the pickle can be read where this package is not
        return (getattr, (self.module, self.name)) if self.before is None else (operator.getitem, ([self.before], 0))

    def take_off(self) -> None:
        """Once nobody's wrapper sits over it; until then it passes calls on."""
        self.call = self.inner
        while isinstance(top := vars(self.module).get(self.name), _Wrapper) and top.call is top.inner:
            if top.before is None:
                delattr(self.module, self.name)
            else:
                setattr(self.module, self.name, top.before)
        disown(self.module)
