"""Attention entropy, streaming, per head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.attention_entropy import check_attention, normalize
from lightning_collapse.functional.attention_rows import entropies_of_call, rows_of_call
from lightning_collapse.metrics.sums import SumsMetric
from lightning_collapse.utilities.attention_calls import AttentionCall, sample


class AttentionEntropy(SumsMetric):
    r"""Normalized entropy of attention weights of every query seen since the last reset, per head.

    Sums, a minimum and a histogram: memory does not grow, uneven batches weigh right, and ``compute`` gives every
    process the mean over the queries of all of them. Rows that see fewer than two keys do not count, rows with NaN or
    infinity are left out and counted in ``nonfinite``.

    As input to ``update``: the arguments of :func:`~lightning_collapse.functional.attention_entropy`.

    As output of ``compute``:

    - ``normalized`` (:class:`~torch.Tensor`): Mean over rows of entropy over its maximum, shape ``(num_heads,)``,
      between 0 (collapsed) and 1 (uniform); NaN before the first row.
      Without the dimension for one head.

    Args:
        num_heads: Number of query heads ``H``.
        bins: Number of equal bins of ``histogram`` between 0 and 1.
        rows: Queries to read of each sequence; ``None`` for all.
        dtype: What the sums are kept in; choose ``torch.float32`` on a device that has no ``float64``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        count: Rows so far, shape ``(num_heads,)``.
        total: Sum of their normalized entropy, ``(num_heads,)``.
        squares: Sum of its square, ``(num_heads,)``.
        lowest: The smallest, ``(num_heads,)``; infinity before the first row.
        histogram: How many lie in each bin, ``(num_heads, bins)``.
        nonfinite: Rows that were left out, ``(num_heads,)``.

    Raises:
        ValueError: If ``num_heads`` or ``bins`` is not positive; in ``update``, if the shapes do not fit.

    Example:
        >>> metric = AttentionEntropy(num_heads=2)
        >>> keys = torch.eye(4).expand(1, 2, 4, 4)
        >>> metric.update(torch.zeros(1, 2, 2, 4), keys)
        >>> metric.compute().float()
        tensor([1., 1.])
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    count: Tensor
    total: Tensor
    squares: Tensor
    lowest: Tensor
    histogram: Tensor
    nonfinite: Tensor

    def __init__(
        self,
        num_heads: int,
        bins: int = 20,
        rows: int | None = None,
        dtype: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_heads < 1:
            raise ValueError(f"`num_heads` must be positive, got {num_heads}.")
        if bins < 1:
            raise ValueError(f"`bins` must be positive, got {bins}.")
        self.num_heads, self.bins, self.rows = num_heads, bins, rows
        for name in ("count", "nonfinite"):
            self.add_state(name, torch.zeros(num_heads, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros(num_heads, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("lowest", torch.full((num_heads,), torch.inf, dtype=dtype), dist_reduce_fx="min")
        self.add_state("histogram", torch.zeros(num_heads, bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        query: Tensor,
        key: Tensor,
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        query_mask: Tensor | None = None,
    ) -> None:
        """Add the queries ``(B, H, L, E)`` of a batch over keys ``(B, H, S, E)``."""
        check_attention(query, key, is_causal, attn_mask, query_mask, self.rows)
        if query.shape[1] != self.num_heads:
            raise ValueError(f"`query` has {query.shape[1]} heads, but `num_heads` is {self.num_heads}.")
        call = AttentionCall(query, key, is_causal, attn_mask, scale, query_mask)
        if self.rows is None:
            entropy, visible = entropies_of_call(call)
        else:
            entropy, visible, _, _ = rows_of_call(sample(call, self.rows))
        values, counts = normalize(entropy.to(self.total), visible.to(self.total))
        values, counts = (tensor.transpose(0, 1).flatten(1) for tensor in (values, counts))
        finite = counts & values.isfinite()
        values = values.where(finite, 0.0)
        self.count = self.count + finite.sum(dim=1)
        self.nonfinite = self.nonfinite + (counts & ~finite).sum(dim=1)
        self.total = self.total + values.sum(dim=1)
        self.squares = self.squares + values.square().sum(dim=1)
        self.lowest = torch.column_stack([self.lowest, values.where(finite, torch.inf)]).amin(dim=1)
        bins = (values * self.bins).long().clamp(0, self.bins - 1)
        self.histogram = self.histogram.scatter_add(1, bins, finite.long())

    def compute(self) -> Tensor:
        """Mean normalized entropy of every head."""
        return self.total / self.count
