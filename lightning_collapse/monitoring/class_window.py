"""Class window: class statistics of the batches right before a point, filled up where the last one is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.seen_classes import SeenClasses, SeenClassMoments

MOST_NUMBERS = 2**18
"""So many numbers of rows wait to be added up together, which costs a fraction of adding batch by batch."""


class ClassWindow:
    """Adds up the rows of batches, some together; rows of one batch more are kept for a point on a short one.

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
        self._moments: SeenClassMoments | None = None  # until rows are added up
        self._taken = 0
        self._waiting: list[list[Tensor]] = []  # rows and labels of the latest batches
        self._latest: list[Tensor] = []
        self._filler: list[Tensor] = []

    def add(self, rows: Tensor, labels: Tensor, early: bool = False) -> None:
        """Add the rows of a batch; or, if it is one more than full ones need, keep them."""
        if early:
            self._filler = [rows, labels]
            return
        self._taken, self._latest = self._taken + len(rows), [rows, labels]
        others = [waiting for waiting, _ in self._waiting]
        if others and (others[0].dtype, others[0].device) != (rows.dtype, rows.device):
            self._add_up()
        self._waiting.append(self._latest)
        if sum(waiting.numel() for waiting, _ in self._waiting) > MOST_NUMBERS:
            self._add_up()

    def pop(self, wanted: int) -> SeenClasses:
        """Statistics of all processes, and begin anew. Collective; waits for the device."""
        if self._taken < wanted and self._filler:  # the point fell on a short batch
            self._waiting.append(self._filler)
        self._add_up()
        moments, self._moments, self._taken = self._moments or self._make(), None, 0
        earlier, self._filler, self._latest = self._filler, self._latest, []
        rows = max((kept[0] for kept in (self._filler, earlier) if kept), key=len, default=None)
        return moments.reduce(rows)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists."""
        rows = {"taken": self._taken, "waiting": self._waiting, "latest": self._latest, "filler": self._filler}
        return {"moments": {} if self._moments is None else self._moments.states(), **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, if that was of as many features and classes."""
        moments, waiting = self._make(), state.get("waiting", [])
        width = moments.moments.shift.shape[1]
        fits = not state["moments"] or moments.load_states(state["moments"])
        if fits and all(rows.shape[1] == width for rows, _ in waiting):
            self._moments = moments if state["moments"] else None
            self._taken, device = state["taken"], moments.names.device
            self._latest, self._filler = ([x.to(device) for x in state[key]] for key in ("latest", "filler"))
            self._waiting = [[x.to(device) for x in batch] for batch in waiting]

    def _add_up(self) -> None:
        if self._waiting:
            rows, labels = zip(*self._waiting, strict=True)
            self._moments = self._moments or self._make()
            self._moments.update(torch.cat(rows), torch.cat(labels))
            self._waiting = []
