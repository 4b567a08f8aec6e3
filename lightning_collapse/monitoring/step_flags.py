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
from lightning_collapse.utilities.private_torch import foreach, tree_leaves

_FOLD = 64
_WATCHED = 8
"""Weights whose gradients are looked at, first and last among them: those of all would cost 5 % of a step of a
small network, and what the backward pass makes reaches every weight before it."""


class StepFlags:
    """Keeps what the latest steps say of themselves, and of those before how many and which were first not finite.

    A loss costs a copy, a batch a look at its extremes, the sums of eight gradients; every 64th loss folds them
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
        self._no_sums = self._none.repeat(len(self.parameters))
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._batches: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._batch = self._none
        self.latest: Tensor | None = None
        self.has_gradients = False
        self._folded = torch.stack([self._none, *[self._none + inf] * 3]).to(self._dtype)
        self._is_bad = torch.zeros(len(self.parameters), dtype=torch.bool, device=self._device)

    def note(self, step: int, loss: Tensor) -> None:
        """Take note of the loss of a step, without its graph."""
        if len(self._losses) >= _FOLD:
            self._fold()
        value = loss.detach()
        # a copy: a view keeps what it is a view of, and the memory may be a CUDA graph's, which the next step writes to
        value = value.sum() if value.ndim else value.clone()
        self.latest = value
        self._steps.append(step)
        self._losses.append(value)
        self._batches.append(self._batch)
        self._sums.append(self._no_sums)
        self._batch = self._none

    @torch.no_grad()
    def note_batch(self, batch: Any) -> None:
        """Take note of the batch of the loss that comes next: minus infinity in it is a mask."""
        found = [readable(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        largest = [extremes(values)[1] for values in found if values is not None]
        if largest:  # of whole numbers there are none to look at
            self._batch = largest[0] if len(largest) == 1 else self._stacked(largest).amax()

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Take note of the gradients that parameters have, after the latest loss; a sum that overflows counts too."""
        found = [parameter.grad for parameter in self.parameters.values()]
        own = [self._none if x is None or x.is_sparse else local_part(x.detach()) for x in found]
        if self._sums and own:
            self.has_gradients = True
            self._sums[-1] = torch.stack(_sums(own, self._none.dtype, self._device))

    def read(self) -> Tensor:
        """How many losses were not finite, and the places of the first loss, gradient and batch; on the device."""
        self._fold()
        return self._folded

    def step_of(self, place: float) -> int | None:
        """The step of a place, brought to the host; ``None`` if it is infinite."""
        return self._steps[int(place)] if place < len(self._steps) else None

    def bad_gradients(self) -> list[str]:
        """The parameters whose gradients were not finite, where some first were not. Waits for the device."""
        return [name for name, is_bad in zip(self.parameters, self._is_bad.tolist(), strict=True) if is_bad]

    @torch.no_grad()
    def _fold(self) -> None:
        if not self._losses:
            return
        end = len(self._steps)
        places = torch.arange(end - len(self._losses), end, device=self._device, dtype=self._dtype)
        rows = ~torch.stack(self._sums).isfinite()
        bad = [~self._stacked(self._losses).isfinite(), rows.any(dim=1), ~(self._stacked(self._batches) < inf)]
        firsts = torch.stack([torch.where(one, places, inf).min() for one in bad])
        row = rows.index_select(0, bad[1].to(torch.uint8).argmax().view(1))[0]
        self._is_bad = torch.where(firsts[1] < self._folded[2], row, self._is_bad)
        self._folded = torch.cat([self._folded[:1] + bad[0].sum(), torch.minimum(self._folded[1:], firsts)])
        self._losses, self._batches, self._sums = [], [], []

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        if len({(value.device, value.dtype) for value in values}) == 1:  # sooner than one by one
            return torch.stack(list(values)).to(self._device, self._dtype)
        return torch.stack([value.to(self._device, self._dtype) for value in values])


def _sums(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A number of each, which is not finite if it holds one that is not."""
    if device.type != "cpu" and all(x.device == device for x in tensors):
        return list(foreach.norm(tensors, 1, dtype=dtype))  # two kernels in all
    # on a CPU half the cost of norms
    return [x.sum(dtype=dtype).to(device) for x in tensors]
