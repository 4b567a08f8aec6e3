"""Places of new rows where the host holds the keys: which of a batch stay, and over which rows they are written."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]
NONE: Indices = np.zeros(0, dtype=np.int64)


class Placed(NamedTuple):
    """Rows of a batch that stay, and where.

    Attributes:
        rows: Their numbers in the batch.
        places: Where each is written.
        gone: Places that hold no row any more, those that are written to among them.
    """

    rows: Indices
    places: Indices
    gone: Indices


def place_largest(keys: Numbers, new: Numbers) -> Placed:
    """Those of old and new rows stay whose keys are the largest; of equal ones the old, and the first.

    Costs a pass over the keys that are kept, and a sort of the new ones that are above the least of them.

    Args:
        keys: Of the places; ``-inf`` where no row is.
        new: Of the batch.

    Example:
        >>> place_largest(np.array([0.4, 0.1, 0.9]), np.array([0.3, 0.05, 0.7]))[:2]
        (array([2]), array([1]))
    """
    above = np.flatnonzero(new > keys.min())
    if not len(above):
        return Placed(NONE, NONE, NONE)
    count = min(len(above), len(keys))
    weakest = np.sort(np.argpartition(keys, count - 1)[:count])
    best = np.argsort(-np.concatenate([keys[weakest], new[above]]), kind="stable")[:count]
    stays = np.zeros(count + len(above), dtype=bool)
    stays[best] = True
    free = weakest[~stays[:count]]
    return Placed(above[stays[count:]], free, free)


class ClassShares:
    """Rows that stay where all classes have equal shares, see :func:`~lightning_collapse.replay.beyond_quota`.

    Knows of every class how many rows it has and the least of their keys, so that a batch costs what of it can stay:
    nothing is sorted but rows of the classes that change.

    Args:
        keys: Of the places; ``-inf`` where no row is.
        labels: Of the places.
        size: How many rows all classes share.
    """

    def __init__(self, keys: Numbers, labels: Indices, size: int) -> None:
        self.size = size
        there = keys > -np.inf
        self.classes, found = np.unique(labels[there], return_inverse=True)
        self.class_of = np.full(len(keys), -1)
        """Number of the class of every place, -1 where no row is."""
        self.class_of[there] = found
        self.counts = np.bincount(found, minlength=len(self.classes))
        self.least = np.full(len(self.classes), np.inf)
        np.minimum.at(self.least, found, keys[there])
        self._share()

    def place(self, keys: Numbers, new: Numbers, labels: Indices) -> Placed:
        """Which rows of a batch stay, and where; the caller writes, and this takes it for written.

        Args:
            keys: Of the places, of which there are as many as rows may stay.
            new: Of the batch.
            labels: Of the batch.
        """
        known = np.searchsorted(self.classes, labels).clip(max=max(len(self.classes) - 1, 0))
        old = self.classes[known] == labels if len(self.classes) else np.zeros(len(labels), dtype=bool)
        fresh = not old[new > -np.inf].all()
        if fresh:
            known = self._welcome(labels, new > -np.inf)
            can = new > -np.inf
        else:
            can = old & (new > np.where(self.counts[known] < self.quotas[known], -np.inf, self.least[known]))
        above = np.flatnonzero(can)
        if not len(above):
            return Placed(NONE, NONE, NONE)
        changes = np.full(len(self.classes) + 1, fresh)  # the last is that of no row
        changes[known[above]] = True
        changes[-1] = False
        held = np.flatnonzero(changes[self.class_of])
        rows, gone = self._compete(keys, held, new, above, known)
        self.class_of[gone] = -1
        places = np.flatnonzero(self.class_of < 0)[: len(rows)]
        self.class_of[places] = known[rows]
        return Placed(rows, places, gone)

    def _compete(
        self, keys: Numbers, held: Indices, new: Numbers, above: Indices, known: Indices
    ) -> tuple[Indices, Indices]:
        """Rows of the batch that stay, and places of old ones that go."""
        pool, of = np.concatenate([keys[held], new[above]]), np.concatenate([self.class_of[held], known[above]])
        order = np.lexsort((-pool, of))  # stable: of equal ones the old
        of = of[order]
        first = np.searchsorted(of, changed := of[np.append(True, of[1:] != of[:-1])])
        sizes = np.append(first[1:], len(of)) - first
        kept = np.minimum(sizes, self.quotas[changed])
        stays = np.arange(len(of)) < np.repeat(first + kept, sizes)
        self.counts[changed] = kept
        some = kept > 0
        self.least[changed[some]] = pool[order[(first + kept - 1)[some]]]
        new_ones = order >= len(held)
        return above[np.sort(order[stays & new_ones]) - len(held)], held[order[~stays & ~new_ones]]

    def _welcome(self, labels: Indices, there: NDArray[np.bool_]) -> Indices:
        """Make room for classes that were not known, and forget those without rows; numbers of classes of a batch."""
        before, here = self.classes, self.counts > 0
        self.classes = np.union1d(before[here], labels[there])
        moved = np.searchsorted(self.classes, before)  # of one that is forgotten no row asks
        self.class_of = np.where(self.class_of < 0, -1, moved[self.class_of] if len(moved) else -1)
        counts, least = np.zeros(len(self.classes), dtype=np.int64), np.full(len(self.classes), np.inf)
        counts[moved[here]], least[moved[here]] = self.counts[here], self.least[here]
        self.counts, self.least = counts, least
        self._share()
        return np.searchsorted(self.classes, labels).clip(max=len(self.classes) - 1)

    def _share(self) -> None:
        number = max(len(self.classes), 1)
        self.quotas = (self.size - np.arange(len(self.classes)) + number - 1) // number
