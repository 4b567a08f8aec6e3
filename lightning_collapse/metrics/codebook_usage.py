"""Usage of a codebook, streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.assignment import assignment_null
from lightning_collapse.functional.codebooks import (
    code_counts,
    code_perplexity,
    miller_madow,
    unseen_mass,
    usage,
    usage_null,
)
from lightning_collapse.metrics.sums import SumsMetric


class CodebookUsage(SumsMetric):
    """How many codes of a codebook all rows since the last reset chose, and how evenly.

    A histogram of whole numbers: memory does not grow, and ``compute`` gives every process that of all of them. It may
    see a validation set, over which published numbers of utilization are taken.

    As input to ``update``: indices of codes, whole numbers of any shape.

    As output of ``compute``: ``usage`` and ``perplexity`` with their nulls ``usage_null`` and ``perplexity_null`` for
    equally likely codes, ``miller_madow`` (the perplexity corrected for few rows), ``unseen_mass``, and ``n``;
    0-dimensional.

    Args:
        codes: Number of codes ``K``.
        kwargs: Passed to :class:`torchmetrics.Metric`.

    Attributes:
        counts: How often each was chosen, ``int64`` of shape ``(K + 1,)``; the last holds indices that are no code.

    Raises:
        ValueError: If there are fewer than two codes.
        TypeError: In ``update``, if indices are no whole numbers.

    References:
        van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*, 2017,
        https://arxiv.org/abs/1711.00937.

    Example:
        >>> metric = CodebookUsage(codes=4)
        >>> metric.update(torch.tensor([[0, 1], [1, 0]]))
        >>> found = metric.compute()
        >>> found["usage"].item(), found["perplexity"].item()
        (0.5, 2.0)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, codes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if codes < 2:
            raise ValueError(f"`codes` must be at least 2, got {codes}.")
        self.codes = codes
        self.add_state("counts", torch.zeros(codes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Add rows by the indices of their codes."""
        self.counts = self.counts + code_counts(indices, self.codes).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Usage over everything seen so far."""
        counts = self.counts[:-1]
        perplexity, n = code_perplexity(counts), int(counts.sum())
        nulls = {"usage_null": usage_null(n, self.codes), "perplexity_null": assignment_null(n, self.codes)}
        return {
            "usage": usage(counts),
            "perplexity": perplexity,
            "miller_madow": miller_madow(counts),
            "unseen_mass": unseen_mass(counts),
            "n": counts.sum(),
            **{name: torch.as_tensor(null).to(perplexity) for name, null in nulls.items()},
        }
