"""Finite rows: NaN and infinity are kept out of a loss, without a wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.utilities.distributed import all_reduce_sum


class FiniteRows:
    """Leaves rows out that are not finite, and counts them over all processes.

    How many rows are left is known to the host only if it waits for the device. So a step with such rows goes without
    the loss, which the device decides by itself, until somebody who waits anyway, at a logging step, has seen one and
    said so with :meth:`expect`; from then on the rows alone are left out.

    Attributes:
        left_out: How many rows were not finite, in any view, over all processes, since :meth:`restart`.
        expected: Whether there are such rows in this training.
    """

    def __init__(self) -> None:
        self.left_out = torch.zeros((), dtype=torch.long)
        self.expected = False

    def restart(self) -> None:
        """Count from 0 again."""
        self.left_out = torch.zeros_like(self.left_out)

    def expect(self) -> None:
        """Such rows were seen: from now on it is worth to wait."""
        self.expected = True

    def select(self, views: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Rows that are finite in every view. Collective.

        Args:
            views: Matrices of shape ``(N, D)``, of one length.

        Returns:
            The rows that count, and, 0-dimensional, whether the loss of them does; ``None`` if it does for sure. Where
            it does not they are zero and take no gradient.
        """
        # NaN passes through a maximum
        largest = [torch.linalg.vector_norm(v.detach(), ord=torch.inf, dim=1) for v in views if v.shape[1]]
        finite = torch.stack([norm.isfinite() for norm in largest]).all(dim=0)
        count = all_reduce_sum((~finite).sum())
        self.left_out = self.left_out.to(count.device) + count
        if self.expected:
            return (tuple(views) if finite.all() else tuple(view[finite] for view in views)), None
        counts = count == 0
        return tuple(torch.where(counts, view, torch.zeros_like(view)) for view in views), counts
