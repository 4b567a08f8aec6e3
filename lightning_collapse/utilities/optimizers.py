"""Optimizers that do more in a step than one gradient and one update."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.optim import LBFGS


def searches_line(optimizer: Any) -> bool:
    """Whether a step cannot do without its closure: it runs it several times, and compares the losses it returns.

    Example:
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> searches_line(torch.optim.LBFGS(weights)), searches_line(torch.optim.SGD(weights))
        (True, False)
    """
    return isinstance(optimizer, LBFGS) or _needs_closure(type(optimizer))  # type: ignore[arg-type]


@lru_cache
def _needs_closure(kind: Any) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def keeps_own_weights(optimizer: Any) -> bool:
    """Whether it trains other weights than it hands over, and so has a ``train()`` and an ``eval()``.

    Example:
        >>> keeps_own_weights(torch.optim.SGD([torch.zeros(2, requires_grad=True)]))
        False
    """
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextmanager
def evaluation_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """The weights that optimizers with ``train()`` and ``eval()`` hand over in eval mode, such as schedule-free ones.

    Training goes on afterwards from what was there, bit by bit.
    """
    switched = []
    for optimizer in optimizers:
        if keeps_own_weights(optimizer):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            before = [weight.detach().clone() for weight in weights]
            optimizer.eval()
            if not all(map(torch.equal, weights, before)):  # else it was in eval mode
                switched.append((optimizer, weights, before))
    try:
        yield
    finally:
        for optimizer, weights, before in switched:
            optimizer.train()
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)
