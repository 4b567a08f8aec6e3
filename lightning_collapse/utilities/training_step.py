"""A wrapper around ``training_step`` that sits on the instance and comes off again, whatever else sits there."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn


def wrap_training_step(module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace ``module.training_step`` by ``around(step, *args, **kwargs)`` until the returned function is called.

    Wrappers nest, and may be taken off in any order. What the instance had before comes back: the method of its class,
    or an attribute of its own, such as the compiled step of ``torch.compile(module)``.

    Args:
        module: A ``LightningModule``.
        around: Called with the step it replaces and the arguments of the call; returns what the step shall return.

    Returns:
        A function that takes the wrapper off; calling it again does nothing.

    Example:
        >>> class Lit(nn.Module):
        ...     def training_step(self, batch):
        ...         return batch + 1
        >>> lit = Lit()
        >>> unwrap = wrap_training_step(lit, lambda step, batch: 10 * step(batch))
        >>> lit.training_step(1)
        20
        >>> unwrap()
        >>> lit.training_step(1), "training_step" in vars(lit)
        (2, False)
    """
    layer = _Layer(before=vars(module).get("training_step"))
    inner: Any = module.training_step

    @wraps(inner, updated=())
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs) if layer.active else inner(*args, **kwargs)

    # Lightning looks one `__wrapped__` deep for the arguments of the step: show it what it would have seen
    training_step.__wrapped__ = getattr(inner, "__wrapped__", inner)
    layer.function = training_step
    setattr(training_step, _LAYER, layer)
    module.training_step = training_step  # type: ignore[assignment]

    def unwrap() -> None:
        layer.active = False
        while (top := _top(module)) is not None and not top.active:
            if top.before is None:
                del module.training_step
            else:
                module.training_step = top.before

    return unwrap


_LAYER = "_collapse_layer"


class _Layer:
    def __init__(self, before: Any) -> None:
        self.before = before
        self.function: Any = None
        self.active = True


def _top(module: nn.Module) -> _Layer | None:
    """Our outermost wrapper, if nobody put another one over it (which may carry our mark: `wraps` copies it)."""
    function = vars(module).get("training_step")
    layer: _Layer | None = getattr(function, _LAYER, None)
    return layer if layer is not None and layer.function is function else None
