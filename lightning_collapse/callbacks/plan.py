"""How rows of a layer are collected before a point."""

from __future__ import annotations

from typing import NamedTuple

from lightning_collapse.utilities.distributed import world_size


class Plan(NamedTuple):
    """How rows of one layer are collected; the same on every process.

    Attributes:
        width: Number of features the layer has.
        limit: Rows to keep per call.
        calls: Calls per batch.
        batches: Training batches before a point to keep rows from.
    """

    width: int
    limit: int
    calls: int
    batches: int

    @classmethod
    def make(cls, rows: int, width: int, count: int, calls: int, between: int) -> Plan:
        """Spread rows over as few batches as hold them.

        Args:
            rows: How many are wanted, on all processes together.
            width: Number of features.
            count: Rows that one batch brings on one process, over all calls.
            calls: Calls per batch.
            between: Batches between two points.
        """
        own = -(-rows // world_size())
        batches = min(-(-own // count), between)
        return cls(width, -(-own // (batches * calls)), calls, batches)
