"""Class window: class statistics of the batches right before a point, filled up where the last one is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_collapse.spectral.seen_classes import SeenClasses, SeenClassMoments


class ClassWindow:
    """Adds up the rows of every batch as it comes; rows of one batch more are kept for a point on a short one.

    Args:
        make: Returns empty statistics.

    Example:
        >>> import torch
        >>> window = ClassWindow(lambda: SeenClassMoments(room=4, dim=1))
        >>> window.add(torch.tensor([[1.0], [3.0]]), torch.tensor([5, 5]))
        >>> window.pop(wanted=2).moments.means.tolist()
        [[2.0], [nan]]
    """

    def __init__(self, make: Callable[[], SeenClassMoments]) -> None:
        self._make = make
        self._moments, self._taken = make(), 0
        self._latest: list[Tensor] = []
        self._filler: list[Tensor] = []

    def add(self, rows: Tensor, labels: Tensor, early: bool = False) -> None:
        """Add the rows of a batch; or, if it is one more than full ones need, keep them."""
        if early:
            self._filler = [rows, labels]
            return
        self._moments.update(rows, labels)
        self._taken, self._latest = self._taken + len(rows), [rows, labels]

    def pop(self, wanted: int) -> SeenClasses:
        """Statistics of all processes, and begin anew. Collective; waits for the device."""
        if self._taken < wanted and self._filler:  # the point fell on a short batch
            self._moments.update(*self._filler)
        moments, self._moments, self._taken = self._moments, self._make(), 0
        earlier, self._filler, self._latest = self._filler, self._latest, []
        rows = max((kept[0] for kept in (self._filler, earlier) if kept), key=len, default=None)
        return moments.reduce(rows)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists."""
        rows = {"taken": self._taken, "latest": self._latest, "filler": self._filler}
        return {"moments": self._moments.states(), **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, if that was of as many features and classes."""
        if self._moments.load_states(state["moments"]):
            self._taken, device = state["taken"], self._moments.names.device
            self._latest, self._filler = ([x.to(device) for x in state[key]] for key in ("latest", "filler"))
