"""Statistics of the classes that were seen: class moments of a stream of any labels, with room for so many classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_gather_rows, all_reduce_max, all_reduce_sum, world_size

FREE = torch.iinfo(torch.int64).max


class SeenClasses(NamedTuple):
    """What all processes have seen.

    Attributes:
        classes: The labels, ascending, ``int64`` ``(K,)``.
        moments: Their statistics, a row each.
        rank: Along how many directions the rows of one batch vary, 0-dimensional; ``None`` where there are no more
            classes than features, so that it does not matter.
        crowded: Rows that there was no room for, 0-dimensional.
    """

    classes: Tensor
    moments: ClassMoments
    rank: Tensor | None
    crowded: Tensor

    def add_counts(self, counts: Tensor) -> Tensor:
        """Rows per label, ``(V,)``, and those of these statistics."""
        return counts.index_add(0, self.classes, self.moments.count.to(counts))


class SeenClassMoments:
    """:class:`ClassMoments` of the classes that come, however many there might be: ``O(K D + D^2)`` numbers.

    A class gets a place when it is first seen, on the device and without waiting for it; rows of classes that come when
    all places are taken are left out and counted. Any integer is a label, but negative ones name no class.

    Args:
        room: Places ``K``.
        dim: Number of features ``D``.
        num_classes: Labels from here on name no class; ``None`` if any number may be a label.
        device: Where the sums live.

    Attributes:
        names: The class of each place, ``int64`` ``(K,)``.
        crowded: Rows that there was no room for, 0-dimensional.
        moments: The statistics, by place.

    Example:
        >>> seen = SeenClassMoments(room=8, dim=1)
        >>> seen.update(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([70_000, 70_000, 12]))
        >>> found = seen.reduce()
        >>> found.classes.tolist(), found.moments.means.tolist()
        ([12, 70000], [[5.0], [2.0]])
    """

    def __init__(
        self, room: int, dim: int, num_classes: int | None = None, device: torch.device | str | None = None
    ) -> None:
        self.moments = ClassMoments(room, dim, device=device)
        self.num_classes = num_classes
        zeros = torch.zeros((), dtype=accumulation_dtype(device), device=device)
        self.names = torch.full((room,), FREE, dtype=torch.int64, device=device)
        self._all_fit = num_classes == room
        if self._all_fit:
            self.names = torch.arange(room, device=device)
        self.crowded = zeros.clone()

    def states(self) -> dict[str, Tensor]:
        """The tensors by name: all there is to save."""
        return {"names": self.names, "crowded": self.crowded, **self.moments.states()}

    def load_states(self, states: dict[str, Tensor]) -> bool:
        """Go on from these, and say whether they fit; those that do not are left."""
        own = self.states()
        if own.keys() != states.keys() or any(own[name].shape != states[name].shape for name in own):
            return False
        for name, state in own.items():
            state.copy_(states[name])
        return True

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add rows ``(N, D)`` of the classes ``(N,)``; -100 is skipped. Waits for nothing."""
        labels = labels.long()
        named = labels >= 0
        if self.num_classes is not None:
            named &= labels < self.num_classes
        if self._all_fit:
            places, found = labels, named
        else:
            self._make_room(torch.where(named, labels, FREE))
            places, found = self._places(labels)
        self.crowded += (named & ~found).sum()
        skipped = torch.where(labels == self.moments.ignore_index, labels, -1)
        places = torch.where(named & found, places, skipped)
        self.moments.update(features, places)

    @full_precision
    def reduce(self, latest: Tensor | None = None) -> SeenClasses:
        """Statistics of all processes together, of the classes that any has seen. Collective; waits for the device.

        Args:
            latest: Rows ``(n, D)`` of one batch, for :attr:`SeenClasses.rank`.
        """
        names = torch.where(self.moments.count > 0, self.names, FREE)
        names = all_gather_rows(names.unsqueeze(1))[0].flatten()
        union = torch.unique(names[names != FREE])[: len(self.names)]  # the same on every process
        # two rows at least: without any there is nothing to take a maximum of
        classes = torch.cat([union, union.new_full((max(2 - len(union), 0),), FREE)])
        aligned = ClassMoments(len(classes), self.moments.shift.shape[1], self.names.device)
        places = torch.searchsorted(classes, self.names).clamp_max(len(classes) - 1)
        kept = (classes[places] == self.names) & (self.names != FREE)
        mine, theirs = kept.nonzero().flatten(), places[kept]
        states = self.moments.states()
        for name, state in aligned.states().items():
            if state.ndim and len(state) == len(classes) and name != "second":
                state.index_copy_(0, theirs, states[name][mine])
            else:
                state.copy_(states[name])
        lost = all_reduce_sum(self.crowded + self.moments.count.sum() - aligned.count.sum())
        found = aligned.reduce() if world_size() > 1 else aligned
        rank, dim = None, found.shift.shape[1]
        if len(classes) > dim:
            own = torch.tensor(dim) if latest is None else feature_rank(latest, found.resolution)
            rank = all_reduce_max(own.to(found.count))
        return SeenClasses(torch.where(classes == FREE, 0, classes), found, rank, lost)

    def _places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each label, and whether it has one."""
        known, order = self.names.sort()
        at = torch.searchsorted(known, labels).clamp_max(len(known) - 1)
        return order[at], known[at] == labels

    def _make_room(self, labels: Tensor) -> None:
        labels = labels.sort().values
        new = (labels != FREE) & ~self._places(labels)[1]
        new[1:] &= labels[1:] != labels[:-1]
        place = (self.names != FREE).sum() + new.cumsum(0) - 1
        outside = len(self.names)
        place = torch.where(new, place, outside).clamp_max(outside)
        self.names.copy_(torch.cat([self.names, self.names[:1]]).scatter(0, place, labels)[:outside])


@full_precision
def feature_rank(rows: Tensor, resolution: float | Tensor) -> Tensor:
    """Along how many directions rows ``(N, D)`` vary by more than their rounding; ``D`` for too few rows to tell.

    Those of one batch: behind a LayerNorm they lie in a plane, and all batches do not, as it turns with the weights.
    """
    dim = rows.shape[1]
    rows, _, weight = finite_rows(rows, dtype=accumulation_dtype(rows.device))
    count = weight.sum()
    centered = (rows - weight @ rows / count) * weight.unsqueeze(1)
    values, vectors = eigenvectors(centered.T @ centered / count)
    rounding = resolution**2 * rows.square().sum(dim=0) / count
    spread = (values > rounding @ vectors.square()) & (values > dim * torch.finfo(values.dtype).eps * values[:1])
    return torch.where(count > dim + 1, spread.sum(), dim)
