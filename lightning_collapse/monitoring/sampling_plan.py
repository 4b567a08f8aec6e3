"""How rows of a layer are collected before a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_collapse.monitoring.feature_hooks import Captured
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.modules import Tap


def captured_shapes(taps: Sequence[Tap], heard: Mapping[str, Captured]) -> list[int]:
    """Rows and features of every layer in one batch, one after the other; zeros where a layer did not run."""
    shapes = [heard[tap.name].rows.shape if tap.name in heard else (0, 0) for tap in taps]
    return [size for shape in shapes for size in shape]


class SamplingPlan(NamedTuple):
    """How rows of one layer are collected; the same on every process.

    Attributes:
        width: Number of features the layer has.
        rows_per_batch: Rows to keep of every batch, on each process.
        batches: Training batches before a point to keep rows from.
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
