"""Metric states: sums that keep their precision, whatever happens to the module that holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SumsMetric(Metric):
    """A metric whose states stay what they are: counts integers or ``float64``, sums in the precision they began with.

    ``half``, ``to``, ``set_dtype`` and the like move them to a device only. ``update`` works in inference mode and
    after it, in any order with ``reset``, and keeps no graph.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            cls.update = _outside_inference_mode(cls.update)  # type: ignore[method-assign]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Metric:
        def move(tensor: Tensor) -> Tensor:
            # a model in half precision takes its metrics along
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, *args, **kwargs)
        return self


def _outside_inference_mode(update: Callable[..., None]) -> Callable[..., None]:
    """States made in inference mode can never be written to outside of it: make them ordinary, and keep them so."""

    @wraps(update)
    def wrapper(self: Metric, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name in self.metric_state:
                state = getattr(self, name)
                if state.is_inference():
                    setattr(self, name, state.clone())
            update(self, *args, **kwargs)

    return wrapper
