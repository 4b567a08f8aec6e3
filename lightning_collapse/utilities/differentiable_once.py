"""Once-differentiable functions: a second derivative that would be wrong is an error."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., Any])


def differentiable_once(backward: Backward) -> Backward:
    """Mark the backward pass of a function whose derivative has none: with ``create_graph=True`` it raises.

    :func:`torch.autograd.function.once_differentiable` is silent where the incoming gradient is a constant, as it is of
    a loss: its second derivative would then lack a part.

    Raises:
        RuntimeError: When the function is differentiated with ``create_graph=True``.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     @staticmethod
        ...     @differentiable_once
        ...     def backward(ctx, gradient):
        ...         return 2 * ctx.saved_tensors[0] * gradient
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(Square.apply(x), x)
        (tensor(6.),)
        >>> torch.autograd.grad(Square.apply(x), x, create_graph=True)
        Traceback (most recent call last):
        RuntimeError: This loss can be differentiated once only, and not with `create_graph=True`. Add it after that.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "This loss can be differentiated once only, and not with `create_graph=True`. Add it after that."
            )
        return backward(ctx, *gradients)

    return wrapper  # type: ignore[return-value]


def once(value: Tensor) -> Tensor:
    """The same value, which can be differentiated once: for one that holds a part of itself constant, as published.

    Its derivative depends on that part too, and autograd would not see it.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(once(x * x.detach()), x)
        (tensor(3.),)
    """
    result: Tensor = _Once.apply(value)  # type: ignore[no-untyped-call]
    return result


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
