"""Step flags: which losses, batches and gradients since the last point were not finite, without waiting for any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.functional.non_finite import extremes
from lightning_collapse.monitoring.call_frames import readable
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.gradients import local_part
from lightning_collapse.utilities.private_torch import tree_leaves

_FOLD = 64
_WATCHED = 8
"""Weights whose gradients are looked at, first and last among them: those of all would cost 5 % of a step of a
small network, and what the backward pass makes reaches every weight before it."""


class StepFlags:
    """Keeps what the latest steps say of themselves, and of those before how many and which were first not finite.

    A loss costs an append, a batch a look at its extremes, the sums of eight gradients; every 64th loss folds them
    into a few numbers on the device. A place is the number of a loss since the last :meth:`clear`, infinite for none.

    Args:
        device: Where the numbers lie.
        parameters: Of the model, by name; the gradients of up to eight are noted.

    Attributes:
        parameters: Those whose gradients are noted, matrices that are trained where there are any.
        latest: The latest loss.
        has_gradients: Whether any were noted.

    Example:
        >>> weights = {"first": torch.ones(2, 2, requires_grad=True), "frozen": torch.ones(2, 2)}
        >>> flags = StepFlags(torch.device("cpu"), weights)
        >>> for step, loss in enumerate([1.0, float("nan"), float("inf")]):
        ...     flags.note(step, torch.tensor(loss))
        ...     weights["first"].grad = torch.full((2, 2), loss)
        ...     flags.note_gradients()
        >>> flags.read().tolist(), flags.step_of(1.0), flags.bad_gradients()
        ([2.0, 1.0, 1.0, inf], 1, ['first'])
    """

    def __init__(self, device: torch.device, parameters: Mapping[str, Tensor]) -> None:
        self._device, self._dtype = device, accumulation_dtype(device)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        known = list((({name: p for name, p in trained.items() if p.ndim > 1}) or trained).items())
        self.parameters = dict(known[i * (len(known) - 1) // (_WATCHED - 1)] for i in range(_WATCHED) if known)
        wide = any(parameter.dtype is torch.float64 for parameter in self.parameters.values())
        self._none = torch.zeros((), device=device, dtype=torch.float64 if wide else torch.float32)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._losses: list[Tensor] = []
        self._batches: list[tuple[int, Tensor]] = []
        self._sums: list[tuple[int, Tensor]] = []
        self._steps: list[int] = []
        self.latest: Tensor | None = None
        self.has_gradients = False
        self._folded = torch.tensor([0.0, inf, inf, inf], device=self._device, dtype=self._dtype)
        self._bad_sums: Tensor | None = None

    def note(self, step: int, loss: Tensor) -> None:
        """Take note of the loss of a step, without its graph."""
        value = loss.detach()
        if value.ndim or value.untyped_storage().nbytes() > value.element_size():
            value = value.sum()  # of a vector; and a view would keep what it is a view of
        self.latest = value
        self._losses.append(value)
        self._steps.append(step)
        if len(self._losses) >= _FOLD:
            self._fold()

    def note_batch(self, batch: Any) -> None:
        """Take note of the batch of the loss that comes next: minus infinity in it is a mask."""
        for tensor in tree_leaves(batch):
            values = readable(tensor) if isinstance(tensor, Tensor) else None
            if values is not None:
                self._batches.append((len(self._steps), extremes(values)[1]))
        if len(self._batches) >= _FOLD:
            self._fold()

    def note_gradients(self) -> None:
        """Take note of the gradients that parameters have, after the latest loss; a sum that overflows counts too."""
        found = [parameter.grad for parameter in self.parameters.values()]
        own = [self._none if x is None or x.is_sparse else local_part(x.detach()) for x in found]
        if self._steps and own:
            self.has_gradients = True
            sums = [
                x.sum(dtype=self._none.dtype).to(self._device) for x in own
            ]  # half the cost of norms, less overflow
            self._sums.append((len(self._steps) - 1, torch.stack(sums)))

    def read(self) -> Tensor:
        """How many losses were not finite, and the places of the first loss, gradient and batch; on the device."""
        self._fold()
        return self._folded

    def step_of(self, place: float) -> int | None:
        """The step of a place, brought to the host; ``None`` if it is infinite."""
        return self._steps[int(place)] if place < len(self._steps) else None

    def bad_gradients(self) -> list[str]:
        """The parameters whose gradients were not finite, where some first were not. Waits for the device."""
        bad = [] if self._bad_sums is None else self._bad_sums.tolist()
        return [name for name, is_bad in zip(self.parameters, bad, strict=bool(bad)) if is_bad]

    @torch.no_grad()
    def _fold(self) -> None:
        count, loss, gradient, batch = self._folded.unbind()
        if self._losses:
            bad = ~self._stacked(self._losses).isfinite()
            start = len(self._steps) - len(self._losses)
            loss, count = torch.minimum(loss, self._first(bad, range(start, len(self._steps)))), count + bad.sum()
        if self._sums:
            places, sums = zip(*self._sums, strict=True)
            rows = ~torch.stack(sums).isfinite()
            first = self._first(rows.any(dim=1), places)
            known = rows.new_zeros(rows.shape[1]) if self._bad_sums is None else self._bad_sums
            self._bad_sums = torch.where(first < gradient, rows[rows.any(dim=1).to(torch.uint8).argmax()], known)
            gradient = torch.minimum(gradient, first)
        if self._batches:
            places, largest = zip(*self._batches, strict=True)
            batch = torch.minimum(batch, self._first(~(self._stacked(largest) < inf), places))
        self._folded = torch.stack([count, loss, gradient, batch])
        self._losses, self._sums, self._batches = [], [], []

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        if len({(value.device, value.dtype) for value in values}) == 1:  # sooner than one by one
            return torch.stack(list(values)).to(self._device, self._dtype)
        return torch.stack([value.to(self._device, self._dtype) for value in values])

    def _first(self, bad: Tensor, places: Sequence[int]) -> Tensor:
        return torch.where(bad, torch.tensor(places, device=self._device, dtype=self._dtype), inf).min()
