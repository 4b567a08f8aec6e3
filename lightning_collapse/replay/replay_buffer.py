"""Replay buffer: a bounded memory of rows, the same sample of the stream however many processes have seen it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_collapse.replay.batch_rows import as_nest, count_rows, leaves, map_rows, row_forms
from lightning_collapse.replay.host_places import ClassShares, place_largest
from lightning_collapse.replay.selection import beyond_quota, herding_order
from lightning_collapse.utilities.arguments import require_one_of, require_whole
from lightning_collapse.utilities.distributed import from_all_processes, process_rank, world_size
from lightning_collapse.utilities.targets import targets_of

Policy = Literal["reservoir", "class_balanced", "herding", "ring", "class_ring"]
Storage = Literal["host", "device"]
NONE = -torch.inf
"""Key of a place that holds no row."""


class ReplayBuffer:
    r"""Keeps ``size`` rows of a stream of batches, and hands out random ones.

    Every row gets a key, and the rows of largest keys stay: over the whole memory, or in equal shares of the classes,
    :math:`\lfloor m / C \rfloor` places each and one more for the first labels. Keys of a ``"reservoir"`` and of
    ``"class_balanced"`` are independent and uniform, so that of :math:`n` rows (of a class) every one is kept with
    probability :math:`m / n`, as by reservoir sampling [1], and of several processes too: the largest keys of all. Keys
    of a ``"ring"`` and ``"class_ring"`` count rows: the latest stay. Those of ``"herding"`` are places in the order of
    iCaRL [2], which looks at all rows of a class and their features at once.

    Its random numbers are its own, other ones on every process, and part of its state: a resumed run goes on as the
    uninterrupted one. Types stay as they come: images in ``uint8`` take a quarter of those in ``float32``.

    Args:
        size: How many rows, of all processes together after :meth:`synchronize`; until then each may hold as many.
        policy: Which rows stay.
        storage: ``"host"``, or ``"device"`` for where the batches are, where it makes nothing wait. Rows that a
            :class:`~lightning_collapse.Replay` keeps there have been through ``on_before_batch_transfer``, so hand them
            on as :meth:`loader`, by which callbacks know.
        seed: Of its random numbers.

    Raises:
        ValueError: If an argument is not one of these.

    References:
        [1] Vitter, *Random Sampling with a Reservoir*, 1985.
        [2] Rebuffi et al., *iCaRL*, CVPR 2017. https://arxiv.org/abs/1611.07725

    Example:
        >>> buffer = ReplayBuffer(size=2, policy="ring")
        >>> buffer.add((torch.arange(5), torch.tensor([0, 0, 1, 1, 1])))
        >>> len(buffer), sorted(buffer.sample(2)[0].tolist()), buffer.nbytes  # two integers of 8 bytes, and 16
        (2, [3, 4], 64)
    """

    def __init__(self, size: int, policy: Policy = "reservoir", storage: Storage = "host", seed: int = 0) -> None:
        require_whole(1, size=size)
        require_one_of(get_args(Policy), policy=policy)
        require_one_of(get_args(Storage), storage=storage)
        self.size, self.policy, self.storage, self.seed = size, policy, storage, seed
        self.seen = 0
        self._passes = 0  # over all rows, each in an order of its own
        self._generator: torch.Generator | None = None
        self._form: dict[str, Any] = {}
        self._rows: Any = None  # a nest of tensors of `size + 1` rows; what is not kept is written to the last
        self._labels = torch.zeros(0, dtype=torch.long)
        self._keys = torch.zeros(0)
        self._used = 0  # no row lies beyond
        self._least = NONE  # a key of other processes below which nothing can stay
        self._shares: ClassShares | None = None  # what is known of the rows of classes, until they change otherwise

    @property
    def needs_labels(self) -> bool:
        """Whether classes share the memory."""
        return self.policy in ("class_balanced", "herding", "class_ring")

    @property
    def nbytes(self) -> int:
        """Bytes of the full buffer: of each row, and 16 for its key and label; 0 before the first batch."""
        return 0 if self._rows is None else self.size * (16 + sum(t[0].nbytes for _, t in leaves(self._rows)))

    def __len__(self) -> int:
        return int(self._valid().sum())

    @property
    def labels(self) -> Tensor:
        """Labels of the rows that are kept, in their order; -1 where there was none."""
        return self._labels[: self._used][self._valid().to(self._labels.device)]

    def check(self, batch: Any, labels: Tensor | None = None) -> tuple[Any, Tensor]:
        """The rows and labels of a batch as :meth:`add` takes them, and room for them.

        Raises:
            ValueError: As :meth:`add` does.
            MemoryError: As :meth:`add` does.
        """
        rows = as_nest(batch)
        count = count_rows(rows)
        device = next(leaves(rows))[1].device
        found = self._labels_of(batch, labels, count)
        if self._rows is None:
            self._make_room(rows, device)
        elif self.storage == "device" and (where := self._place(device)) != self._labels.device:
            state = self.state_dict()  # loaded on another
            self._make_room(rows, where)
            self._write(state["keys"], state["labels"], state["rows"])
        known, given = self._form, row_forms(rows)
        for path in () if known == given else sorted(known.keys() | given.keys()):
            if known.get(path) != given.get(path):
                raise ValueError(
                    f"`{path}` has rows {_described(given.get(path))}, and the buffer holds"
                    f" {_described(known.get(path))}. Pass batches of one form, or make a new `ReplayBuffer`."
                )
        return rows, found

    @torch.no_grad()
    def add(self, batch: Any, labels: Tensor | None = None, features: Tensor | None = None) -> None:
        """Offer the rows of a batch; waits for nothing where they are stored on their device, but for ``"herding"``.

        Args:
            batch: A tensor, or any nest of dictionaries, lists and tuples of tensors, with ``N`` rows each.
            labels: Classes, integers of shape ``(N,)``; ``None`` looks where a batch usually has them.
            features: Shape ``(N, D)``, for ``"herding"``, which wants all rows of a class in one call.

        Raises:
            ValueError: If the batch holds anything but tensors of ``N`` rows, rows of another form than before, if
                labels are needed and not there or no integers, or if ``"herding"`` gets no features.
            MemoryError: At the first batch, if the full buffer is larger than the memory of where it would be.
        """
        rows, labels = self.check(batch, labels)
        keys = self._new_keys(labels, features)
        self.seen += len(labels)
        self._insert(rows, labels, keys)

    @torch.no_grad()
    def sample(self, n: int) -> Any:
        """Random rows, none of them twice, or all if there are fewer; ``None`` if there are none.

        Of classes on a device, where their number is not known without a wait, rows come twice rather than fewer.
        """
        require_whole(0, n=n)
        valid = self._valid()
        if valid.device.type == "cpu":
            there = valid.nonzero().squeeze(1)
            chosen = torch.randperm(len(there), generator=self._random())[:n]
            return self._at(there[chosen]) if len(chosen) else None
        if not (n := min(n, self._used)):
            return None
        scores = torch.rand(self._used, generator=self._random(), dtype=torch.float64).to(valid.device)
        places = scores.masked_fill(~valid, -1.0).topk(n).indices
        return self._at(places[torch.arange(n, device=valid.device) % valid.sum()])

    def loader(self, batch_size: int, shuffle: bool = True) -> ReplayLoader:
        """Passes over all rows, as batches; each of this buffer in another order, and no row is drawn otherwise."""
        require_whole(1, batch_size=batch_size)
        return ReplayLoader(self, batch_size, shuffle)

    @torch.no_grad()
    def synchronize(self) -> Tensor:
        """Keep of what all processes hold what one would: the largest keys of all. Collective; for ends of tasks.

        Each process goes on with those of the rows that are its own. Keys and labels travel, no rows. Of
        ``"herding"``, whose order each process finds among its own rows, the first of all processes stay.

        Returns:
            Labels of all rows that are kept, of all processes, shape ``(n,)``.
        """
        # waits for the device, once per task
        keys, labels = self._keys[: self._used].cpu(), self._labels[: self._used].cpu()
        found = from_all_processes((keys, labels, self.seen))
        every, of_every = torch.cat([keys for keys, *_ in found]), torch.cat([labels for _, labels, _ in found])
        if self.needs_labels:
            every = every.masked_fill(beyond_quota(every, of_every, self.size), NONE)
        best = every.argsort(descending=True, stable=True)[: self.size]
        best = best[every[best] > NONE]
        if world_size() == 1 or not len(every):
            return of_every[best]
        first = sum(len(keys) for keys, *_ in found[: process_rank()])
        mine = best[(best >= first) & (best < first + len(keys))].sort().values - first
        if self._rows is not None:
            self._write(keys[mine], labels[mine], self._at(mine))
        if not self.needs_labels and len(best) == self.size:
            self._least = float(every[best[-1]])
        if self.policy in ("ring", "class_ring"):
            self.seen = max(seen for *_, seen in found)  # what comes next is later than what any process holds
        return of_every[best]

    def state_dict(self) -> dict[str, Any]:
        """Rows and random numbers, as tensors, numbers and nests of them."""
        return {
            "policy": self.policy,
            "rows": None if self._rows is None else map_rows(lambda t: t[: self._used].clone(), self._rows),
            "keys": self._keys[: self._used].clone(),
            "labels": self._labels[: self._used].clone(),
            "random": self._random().get_state(),
            "seen": self.seen,
            "passes": self._passes,
            "least": self._least,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; the best rows stay if this buffer is smaller.

        Raises:
            ValueError: If it is of a buffer with another policy, whose keys mean something else.
        """
        self._check_policy(state)
        self._rows, self._used, self.seen = None, 0, 0
        if state["rows"] is not None and len(state["keys"]) <= self.size:
            self._make_room(state["rows"], next(leaves(state["rows"]))[1].device)
            self._write(state["keys"], state["labels"], state["rows"])  # in the same places
        else:
            self.merge(state)
        self.seen, self._least, self._passes = state["seen"], state["least"], state.get("passes", 0)
        self._random().set_state(state["random"].cpu())

    @torch.no_grad()
    def merge(self, state: Mapping[str, Any]) -> None:
        """Take the rows of another buffer in, as if this one had seen them.

        Raises:
            ValueError: If it has another policy, whose keys mean something else.
        """
        self._check_policy(state)
        self.seen += state["seen"]
        if state["rows"] is None:
            return
        if self._rows is None:
            self._make_room(state["rows"], next(leaves(state["rows"]))[1].device)
        self._insert(state["rows"], state["labels"], state["keys"])

    def _check_policy(self, state: Mapping[str, Any]) -> None:
        if (policy := state.get("policy", self.policy)) != self.policy:
            raise ValueError(
                f"This `ReplayBuffer` has `policy={self.policy!r}`, and the state is of one with {policy!r}. Take that,"
                " or begin with an empty buffer: `buffer.add(batch)` of the rows."
            )

    def _insert(self, rows: Any, labels: Tensor, keys: Tensor) -> None:
        """Write the rows whose keys are large enough over those with the smallest."""
        keys = keys.to(self._keys.device, self._keys.dtype)
        if self.needs_labels and self.storage == "device":
            self._insert_without_wait(rows, labels.to(self._labels.device), keys)
            return
        keys = keys if self._least == NONE else keys.masked_fill(keys < self._least, NONE)
        kept, new = self._keys[: self.size].numpy(), keys.numpy()
        if not (count := int((new > NONE).sum())):
            return
        if self.needs_labels:
            if self._shares is None:
                self._shares = ClassShares(kept, self._labels[: self.size].numpy(), self.size)
            # waits for the device, as copying rows to the host does; with `storage="device"` nothing of this runs
            placed = self._shares.place(kept, new, labels.cpu().numpy())
        else:
            placed = place_largest(kept[: min(self.size, self._used + count)], new)
        kept[placed.gone] = NONE
        if not len(placed.rows):
            return
        kept[placed.places] = new[placed.rows]
        self._used = max(self._used, int(placed.places.max()) + 1)
        self._copy(rows, labels, torch.from_numpy(placed.rows), torch.from_numpy(placed.places))

    def _insert_without_wait(self, rows: Any, labels: Tensor, keys: Tensor) -> None:
        """The same where no host knows which rows stay: what does not goes to the last place."""
        self._used = used = min(self.size, self._used + len(keys))
        every = torch.cat([self._keys[:used], keys])
        every = every.masked_fill(beyond_quota(every, torch.cat([self._labels[:used], labels]), self.size), NONE)
        self._keys[:used], keys = every[:used], every[used:]
        weakest = self._keys[:used].topk(min(len(keys), used), largest=False).indices.sort().values
        pool = torch.cat([self._keys[weakest], keys])
        stays = torch.zeros(len(pool), dtype=torch.bool, device=keys.device)
        stays[pool.argsort(descending=True, stable=True)[: len(weakest)]] = True
        olds, news = stays[: len(weakest)], stays[len(weakest) :]
        # places of old rows that go, one for each new row that stays
        free = weakest[olds.int().argsort(stable=True)]
        places = torch.where(news, free[(news.cumsum(0) - 1).clamp(0, max(len(free) - 1, 0))], self.size)
        self._keys.index_copy_(0, places, keys)
        self._keys[self.size] = NONE
        self._copy(rows, labels, None, places)

    def _copy(self, rows: Any, labels: Tensor, which: Tensor | None, places: Tensor) -> None:
        """Write rows, all or some, to places."""
        store = self._labels.device
        places = places.to(store, non_blocking=True)
        held, offered = ([tensor for _, tensor in leaves(nest)] for nest in (self._rows, rows))
        for kept, new in zip([self._labels, *held], [labels, *offered], strict=True):
            some = new if which is None else new.index_select(0, which.to(new.device, non_blocking=True))
            kept.index_copy_(0, places, some.to(store))

    def _new_keys(self, labels: Tensor, features: Tensor | None) -> Tensor:
        count = len(labels)
        if self.policy in ("reservoir", "class_balanced"):
            return torch.rand(count, generator=self._random(), dtype=torch.float64)
        if self.policy != "herding":
            return torch.arange(self.seen, self.seen + count, dtype=torch.float64)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count:
            got = tuple(features.shape) if isinstance(features, Tensor) else features
            raise ValueError(
                f"`features` must have shape ({count}, D) for `policy='herding'`, got {got!r:.80}. Pass those of all"
                " rows of each class in one call."
            )
        keys = torch.full((count,), NONE, dtype=torch.float64)
        for label in sorted(set(labels.tolist())):  # waits for the device: of a task's rows at its end, not of a step's
            of_class = (labels == label).nonzero().squeeze(1).cpu()
            order = herding_order(features[of_class.to(features.device)], self.size).cpu()
            keys[of_class[order]] = -torch.arange(len(order), dtype=torch.float64)
        return keys

    def _labels_of(self, batch: Any, labels: Tensor | None, count: int) -> Tensor:
        found = targets_of(batch) if labels is None else labels
        whole = isinstance(found, Tensor) and not (found.is_floating_point() or found.is_complex())
        if whole and found.shape == (count,) and found.dtype != torch.bool:  # type: ignore[union-attr]
            return found.detach().long()  # type: ignore[union-attr]
        if labels is None and not self.needs_labels:
            return torch.full((count,), -1)
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.80}"
        raise ValueError(f"`labels` must be integers of shape ({count},), one class per row, got {got}. Pass them.")

    def _place(self, device: torch.device) -> torch.device:
        """Where rows are stored of batches on a device; MPS lacks the precision of the keys."""
        return device if self.storage == "device" and device.type != "mps" else torch.device("cpu")

    def _make_room(self, rows: Any, device: torch.device) -> None:
        where = self._place(device)
        shapes = [(t.shape[1:], t.dtype) for _, t in leaves(rows)]
        needed = self.size * (16 + sum(prod(shape) * dtype.itemsize for shape, dtype in shapes))
        memory = _memory(where)
        if needed > memory:
            raise MemoryError(
                f"`size={self.size}` rows of {needed // self.size} bytes take {needed / 1e9:.4g} GB, and {where} has"
                f" {memory / 1e9:.4g} GB. Choose a smaller `size`, or store images as `uint8`."
            )
        room = self.size + 1
        self._shares, self._form = None, row_forms(rows)
        self._rows = map_rows(lambda t: torch.zeros((room, *t.shape[1:]), dtype=t.dtype, device=where), rows)
        self._labels = torch.full((room,), -1, device=where)
        home = where if self.needs_labels else torch.device("cpu")
        self._keys = torch.full((room,), NONE, dtype=torch.float64, device=home)

    def _write(self, keys: Tensor, labels: Tensor, rows: Any) -> None:
        """Hold these rows alone, in this order."""
        self._used, self._shares = len(keys), None
        self._keys.fill_(NONE)
        self._keys[: self._used], self._labels[: self._used] = keys, labels
        for (_, kept), (_, row) in zip(leaves(self._rows), leaves(rows), strict=True):
            kept[: self._used] = row

    def _at(self, places: Tensor) -> Any:
        return map_rows(lambda t: t.index_select(0, places.to(t.device, non_blocking=True)), self._rows)

    def _valid(self) -> Tensor:
        return self._keys[: self._used] > NONE

    def _random(self) -> torch.Generator:
        if self._generator is None:  # not before: which process this is may not be known earlier
            self._generator = torch.Generator().manual_seed(self.seed + 1_000_003 * process_rank())
        return self._generator


class ReplayLoader:
    """Batches of all rows of a buffer, as often as it is iterated over; see :meth:`ReplayBuffer.loader`."""

    def __init__(self, buffer: ReplayBuffer, batch_size: int, shuffle: bool) -> None:
        self.buffer, self.batch_size, self.shuffle = buffer, batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.buffer) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        places = self.buffer._valid().nonzero().squeeze(1)
        if self.shuffle:
            own = torch.Generator().manual_seed(self.buffer.seed + self.buffer._passes)
            self.buffer._passes += 1
            places = places[torch.randperm(len(places), generator=own).to(places.device)]
        for first in range(0, len(places), self.batch_size):
            yield self.buffer._at(places[first : first + self.batch_size])


def _described(form: tuple[Any, Any] | None) -> str:
    return "nothing there" if form is None else f"of shape {tuple(form[0])} and {form[1]}"


def _memory(device: torch.device) -> float:
    """Bytes that a device has in all, infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
