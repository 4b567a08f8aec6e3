"""Finite rows: NaN and infinity are kept out of a loss, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.utilities.distributed import all_reduce_sum


class FiniteRows:
    """Leaves rows out that are not finite, and counts them over all processes.

    How many rows are left is known to the host only if it waits for the device. So a step with such rows goes without
    the loss, which the device decides by itself, until somebody who waits anyway, after the first step and at logging
    steps, has asked :meth:`look`. If there were any, the rows alone are left out from then on.

    Attributes:
        left_out: How many rows were not finite, in any view, over all processes, since :meth:`restart`.
        expected: Whether there are such rows in this training; ``None`` before the first look.
    """

    def __init__(self) -> None:
        self.left_out = torch.zeros((), dtype=torch.long)
        self.expected: bool | None = None

    def look(self) -> bool:
        """Whether there have been such rows; waits for the device."""
        self.expected = self.expected or bool(self.left_out)
        return self.expected

    def restart(self) -> None:
        """Count from 0 again."""
        self.left_out = torch.zeros_like(self.left_out)

    def select(
        self, views: Sequence[Tensor], labels: Sequence[Tensor] = ()
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Rows that are finite in every view. Collective.

        Args:
            views: Matrices of shape ``(N, D)``, of one length.
            labels: Of the rows, ``(N,)`` each; they go with their rows.

        Returns:
            The rows that count, labels behind them, and, 0-dimensional, whether the loss of them does; ``None`` if it
            does for sure. Where it does not they are zero and take no gradient.
        """
        # a sum is not finite where any of its terms is not; that it overflows is beyond all features
        sums = [v.detach().sum(dim=1, dtype=torch.promote_types(v.dtype, torch.float32)) for v in views]
        finite = torch.stack([total.isfinite() for total in sums]).all(dim=0)
        count = all_reduce_sum((~finite).sum())
        self.left_out = self.left_out.to(count.device) + count
        if self.expected:
            rows = (*views, *labels)
            return (rows if finite.all() else tuple(row[finite] for row in rows)), None
        counts = count == 0
        return (*(torch.where(counts, view, 0.0) for view in views), *labels), counts
