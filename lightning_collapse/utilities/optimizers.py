"""Optimizers: what one needs, told before the first step."""

from inspect import Parameter, signature
from typing import Any

from torch.optim import Optimizer


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer keeps other weights for training than for use, and switches by ``train()`` and ``eval()``.

    Schedule-free optimizers do.

    Example:
        >>> import torch
        >>> has_modes(torch.optim.SGD([torch.zeros(1)], lr=0.1))
        False
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates the loss itself, maybe several times a step: its ``step`` asks for a closure.

    Example:
        >>> import torch
        >>> needs_closure(torch.optim.LBFGS([torch.zeros(1)])), needs_closure(torch.optim.SGD([torch.zeros(1)], lr=0.1))
        (True, False)
    """
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty
