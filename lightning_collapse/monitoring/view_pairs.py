"""View pairs: rows of two views of the same samples, which layers see two views at all, and LiDAR of these."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.lidar import Lidar, lidar_of_moments
from lightning_collapse.functional.views import view_statistics
from lightning_collapse.spectral.view_moments import ViewMoments, reduce_view_moments
from lightning_collapse.utilities.distributed import all_reduce_sum

ROWS = 192
"""Rows of a view in a point, and at most of a batch; for LiDAR as many batches more as the window has."""
CERTAIN = 6.0
"""How many standard errors above chance samples must be found again to be views."""
TRIES = 3
"""Points after which a layer without views is left alone."""


class ViewPairs:
    """Keeps pairs of rows of the latest batches, and sums up how well one view finds the other.

    Candidates of a row are those of its own batch, and only batches of the usual size count: chance is the same at
    every point. Two calls of a layer, or the two halves of one call, are views where samples are found again far above
    chance at the beginning of the run, when the network is nearly random: a discriminator's real and generated images
    are none, nor are the two halves of a batch of a classifier.

    Attributes:
        layers: Layers that see two views.
        open: Whether there may be others.
    """

    def __init__(self) -> None:
        self.layers: set[str] = set()
        self.open = True
        self._batches: dict[str, list[tuple[int, Tensor]]] = {}
        self._tries: dict[str, list[float]] = {}

    def add(self, layer: str, time: int, views: Tensor) -> None:
        """Keep the views ``(2, n, D)`` of a layer in a batch, and of older batches as many as fill a point."""
        if not self.open and layer not in self.layers:
            return
        kept = self._batches.setdefault(layer, [])
        usual = max((batch.shape for _, batch in kept), default=views.shape)
        if views.shape[2] != usual[2] or views.shape[1] > usual[1]:
            kept.clear()
        elif views.shape[1] < usual[1]:
            return
        kept.append((time, views))
        del kept[: -max(max(ROWS, 2 * views.shape[2]) // views.shape[1], 1)]

    def read(self, layers: list[str], since: int, device: torch.device) -> dict[str, Tensor]:
        """Sums over the pairs of all processes, see :func:`~lightning_collapse.functional.views.view_statistics`.

        Collective, with the same layers in the same order.

        Args:
            layers: Of which to say something; what no process has views of reads 0.
            since: Time of the oldest batch to count.
            device: Where to put what nothing is known of.
        """
        layers = [layer for layer in layers if self.open or layer in self.layers]
        groups: dict[Hashable, list[tuple[int, Tensor]]] = {}
        for i, layer in enumerate(layers):
            for time, views in _latest(self._batches.get(layer, ())):
                if time >= since:
                    groups.setdefault((views.shape, views.dtype, views.device), []).append((i, views))
        total = torch.zeros(len(layers), 5, device=device, dtype=torch.float64 if device.type != "mps" else None)
        for members in groups.values():
            stacked = torch.stack([views for _, views in members])
            found = view_statistics(stacked[:, 0], stacked[:, 1]).to(total)
            total.index_add_(0, torch.tensor([i for i, _ in members], device=device), found)
        total = all_reduce_sum(total) if layers else total
        return dict(zip(layers, total.unbind(), strict=True))

    def lidar(self, widths: Mapping[str, int], since: int, device: torch.device) -> dict[str, Lidar]:
        """LiDAR of the pairs of all processes, of layers that are known to see two views. Collective, likewise.

        In units of the variance within samples, so that the scale of the features does not matter.

        Args:
            widths: Features of the layers of which to say something, by name; the same on every process.
            since: Time of the oldest batch to count.
            device: As in :meth:`read`.
        """
        moments = {layer: ViewMoments(width, device) for layer, width in widths.items() if layer in self.layers}
        for layer, of in moments.items():
            for time, views in self._batches.get(layer, ()):
                if time >= since and views.shape[2] == widths[layer]:
                    of.update(views.to(of.within.device))
        if not moments:
            return {}
        reduced = reduce_view_moments(list(moments.values()))
        return {layer: lidar_of_moments(of, relative=True) for layer, of in zip(moments, reduced, strict=True)}

    def judge(self, sums: Mapping[str, list[float]]) -> None:
        """Decide from the first points which layers see two views; given what :meth:`read` returned, on the host."""
        if not self.open:
            return
        for layer, (pairs, hits, chances, *_) in sums.items():
            so_far = self._tries.setdefault(layer, [0.0, 0.0, 0.0, 0.0])
            # the hits of a batch by chance are as good as Poisson distributed with mean 1
            so_far[:] = [a + b for a, b in zip(so_far, (pairs, hits, chances, 1.0), strict=True)]
            if so_far[0] and so_far[1] - so_far[2] > CERTAIN * sqrt(max(so_far[2], 1.0)):
                self.layers.add(layer)
        if self._tries and all(tries >= TRIES for *_, tries in self._tries.values()):
            self.open = False
            self._batches = {layer: kept for layer, kept in self._batches.items() if layer in self.layers}

    def clear(self) -> None:
        """Forget the rows."""
        self._batches.clear()

    def state_dict(self, rows: bool) -> dict[str, Any]:
        """What a resumed fit must know, with or without the rows: lists, numbers and tensors."""
        batches = self._batches if rows else {}
        return {
            "layers": sorted(self.layers),
            "open": self.open,
            "tries": {layer: list(of) for layer, of in self._tries.items()},
            "batches": {layer: [list(batch) for batch in kept] for layer, kept in batches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on where :meth:`state_dict` was called."""
        self.layers, self.open = set(state["layers"]), state["open"]
        self._tries = {layer: list(of) for layer, of in state["tries"].items()}
        batches = state["batches"]
        self._batches = {layer: [(time, views.to(device)) for time, views in batches[layer]] for layer in batches}


def _latest(kept: Sequence[tuple[int, Tensor]]) -> Sequence[tuple[int, Tensor]]:
    """As many of the batches as fill a point."""
    return kept[-max(ROWS // kept[-1][1].shape[1], 1) :] if kept else ()
