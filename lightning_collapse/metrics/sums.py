"""Sums that outlive a change of the model's precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class SumsMetric(Metric):
    """A metric whose states keep their precision when the module that holds it is converted to another."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Metric:
        def move(tensor: Tensor) -> Tensor:
            # a model in half precision takes its metrics along: sums must stay what they are
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() and moved.dtype != tensor.dtype else moved

        super()._apply(move, *args, **kwargs)
        return self
