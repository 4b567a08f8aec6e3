"""Sampling plan: how rows of a layer are collected before a point."""

from __future__ import annotations

from typing import NamedTuple

from lightning_collapse.utilities.distributed import world_size


class SamplingPlan(NamedTuple):
    """How rows of one layer are collected; the same on every process.

    Attributes:
        width: Number of features the layer has.
        rows_per_batch: Rows to keep of every batch, on each process.
        batches: Training batches before a point that hold as many rows as a point rests on.
    """

    width: int
    rows_per_batch: int
    batches: int

    @classmethod
    def make(cls, rows: int, width: int, per_batch: int, between: int) -> SamplingPlan:
        """Spread rows over as few batches as hold them.

        Args:
            rows: How many are wanted, on all processes together.
            width: Number of features.
            per_batch: Rows that one batch brings on one process.
            between: Batches between two points.
        """
        own = -(-rows // world_size())
        batches = min(-(-own // per_batch), between)
        return cls(width, -(-own // batches), batches)

    @property
    def rows(self) -> int:
        """Rows of a point on each process, at most."""
        return self.rows_per_batch * self.batches

    @property
    def window(self) -> int:
        """Batches to listen to: one more than full ones need, since an epoch's last batch may be a short one."""
        return self.batches + 1
