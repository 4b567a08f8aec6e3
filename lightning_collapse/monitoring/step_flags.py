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
from lightning_collapse.utilities.gradients import gradients_of, squared_norms
from lightning_collapse.utilities.private_torch import tree_leaves

_FOLD = 64


class StepFlags:
    """Keeps what the latest steps say of themselves, and of those before how many and which were first not finite.

    A loss costs an append, a batch a look at its extremes, a gradient its norms; every 64th loss folds them into a few
    numbers on the device. A place is the number of a loss since the last :meth:`clear`, infinite for none.

    Args:
        device: Where the numbers lie.
        parameters: Whose gradients are noted, by name.

    Attributes:
        latest: The latest loss.
        has_gradients: Whether any were noted.

    Example:
        >>> flags = StepFlags(torch.device("cpu"), {"weight": torch.ones(2), "frozen": torch.ones(2)})
        >>> for step, loss in enumerate([1.0, float("nan"), float("inf")]):
        ...     flags.note(step, torch.tensor(loss))
        ...     flags.parameters["weight"].grad = torch.full((2,), loss)
        ...     flags.note_gradients()
        >>> flags.read().tolist(), flags.step_of(1.0), flags.bad_gradients()
        ([2.0, 1.0, 1.0, inf], 1, ['weight'])
    """

    def __init__(self, device: torch.device, parameters: Mapping[str, Tensor]) -> None:
        self._device, self._dtype = device, accumulation_dtype(device)
        self.parameters = dict(parameters)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._losses: list[Tensor] = []
        self._batches: list[tuple[int, Tensor]] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._steps: list[int] = []
        self.latest: Tensor | None = None
        self.has_gradients = False
        self._folded = torch.tensor([0.0, inf, inf, inf], device=self._device, dtype=self._dtype)
        self._bad_norms: Tensor | None = None

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
        """Take note of the gradients that parameters have, after the latest loss; an infinite norm counts too."""
        found = gradients_of(list(self.parameters.values()), sparse=False)
        own = [torch.zeros((), device=self._device)] * len(self.parameters)
        for i, tensor in zip(found.indices, found.tensors, strict=True):
            own[i] = tensor
        if self._steps:
            self.has_gradients = True
            self._norms.append((len(self._steps) - 1, squared_norms(own, self._device)))

    def read(self) -> Tensor:
        """How many losses were not finite, and the places of the first loss, gradient and batch; on the device."""
        self._fold()
        return self._folded

    def step_of(self, place: float) -> int | None:
        """The step of a place, brought to the host; ``None`` if it is infinite."""
        return self._steps[int(place)] if place < len(self._steps) else None

    def bad_gradients(self) -> list[str]:
        """The parameters whose gradients were not finite, where some first were not. Waits for the device."""
        bad = [] if self._bad_norms is None else self._bad_norms.tolist()
        return [name for name, is_bad in zip(self.parameters, bad, strict=bool(bad)) if is_bad]

    @torch.no_grad()
    def _fold(self) -> None:
        count, loss, gradient, batch = self._folded.unbind()
        if self._losses:
            bad = ~self._stacked(self._losses).isfinite()
            start = len(self._steps) - len(self._losses)
            loss, count = torch.minimum(loss, self._first(bad, range(start, len(self._steps)))), count + bad.sum()
        if self._norms:
            places, norms = zip(*self._norms, strict=True)
            rows = ~torch.stack(norms).isfinite()
            first = self._first(rows.any(dim=1), places)
            known = rows.new_zeros(rows.shape[1]) if self._bad_norms is None else self._bad_norms
            self._bad_norms = torch.where(first < gradient, rows[rows.any(dim=1).to(torch.uint8).argmax()], known)
            gradient = torch.minimum(gradient, first)
        if self._batches:
            places, largest = zip(*self._batches, strict=True)
            batch = torch.minimum(batch, self._first(~(self._stacked(largest) < inf), places))
        self._folded = torch.stack([count, loss, gradient, batch])
        self._losses, self._norms, self._batches = [], [], []

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.to(self._device, self._dtype) for value in values])

    def _first(self, bad: Tensor, places: Sequence[int]) -> Tensor:
        return torch.where(bad, torch.tensor(places, device=self._device, dtype=self._dtype), inf).min()
