"""Load of the experts of a mixture, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.routing import SUMS, Scores, routing_readings, routing_sums
from lightning_collapse.metrics.sums import SumsMetric


class RouterLoad(SumsMetric):
    """How evenly a router spread all tokens seen since the last reset over its experts.

    Counts and sums: memory does not grow, uneven batches weigh right, and ``compute`` gives every process the load over
    the tokens of all of them. Compare windows of as many tokens only, beside
    :func:`~lightning_collapse.functional.load_cv2_null`.

    As input to ``update``: logits ``(T, E)`` and the indices ``(T, k)`` of the experts chosen.

    As output of ``compute``: the dictionary that
    :func:`~lightning_collapse.functional.routing.routing_readings` returns, but for ``nonfinite``.

    Args:
        experts: Number of experts ``E``.
        scores: Gates are a ``"softmax"``, or ``"sigmoid"`` over their sum.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        sums: What :func:`~lightning_collapse.functional.routing.routing_sums` returns, over all tokens.
        nonfinite: Tokens of this process that were left out.

    Raises:
        ValueError: If there are fewer than two experts; in ``update``, if there is another number.

    Example:
        >>> metric, logits = RouterLoad(experts=2), torch.tensor([[3.0, 0.0], [2.0, 0.0]])
        >>> metric.update(logits, logits.argmax(dim=1, keepdim=True))
        >>> metric.compute()["effective_experts"].item(), metric.compute()["dead"].item()
        (1.0, 1.0)
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    sums: Tensor

    def __init__(
        self, experts: int, scores: Scores = "softmax", dtype: torch.dtype = torch.float64, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if experts < 2:
            raise ValueError(f"`experts` must be at least 2, got {experts}.")
        self.experts, self.scores = experts, scores
        self.add_state("sums", torch.zeros(len(SUMS) + 2 * experts, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor, chosen: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add tokens: logits ``(T, E)``, chosen experts ``(T, k)`` and a boolean mask ``(T,)``."""
        if logits.ndim != 2 or logits.shape[1] != self.experts:
            raise ValueError(f"`logits` must have shape (T, {self.experts}), got {tuple(logits.shape)}.")
        self.sums = self.sums + routing_sums(logits.detach(), chosen, self.scores, mask).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Load and gates over everything seen so far."""
        found = routing_readings(self.sums)
        del found["nonfinite"]
        return found

    @property
    def nonfinite(self) -> Tensor:
        """Tokens of this process that were left out, 0-dimensional."""
        return routing_readings(self.sums)["nonfinite"]
