"""Loss flags: which losses since the last point were NaN or infinite, told without waiting for any of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype

_FOLD = 64


class LossFlags:
    """Keeps the losses of the latest steps and, of those before, how many were not finite and which was the first.

    A step costs an append; every 64th folds them into two numbers on the device.

    Args:
        device: Where the numbers lie.

    Attributes:
        latest: The latest loss.

    Example:
        >>> flags = LossFlags(torch.device("cpu"))
        >>> for step, loss in enumerate([1.0, float("nan"), float("inf")]):
        ...     flags.note(step, torch.tensor(loss))
        >>> count, first = flags.read()
        >>> int(count), flags.step_of(float(first))
        (2, 1)
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._dtype = device, accumulation_dtype(device)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._losses: list[Tensor] = []
        self._steps: list[int] = []
        self.latest: Tensor | None = None
        self._counted: tuple[Tensor, Tensor] | None = None

    @property
    def noted(self) -> int:
        """How many losses there were since the last :meth:`clear`."""
        return len(self._steps)

    def note(self, step: int, loss: Tensor) -> None:
        """Take note of the loss of a step, without its graph."""
        value = loss.detach()
        if value.ndim or value.untyped_storage().nbytes() > value.element_size():
            value = value.sum()  # of a vector; and a view would keep what it is a view of
        self.latest = value
        self._losses.append(value)
        self._steps.append(step)
        if len(self._losses) >= _FOLD:
            self._counted = self._fold()

    def read(self) -> tuple[Tensor, Tensor]:
        """How many were not finite, and the place of the first among them, for :meth:`step_of`; on the device."""
        if self._counted is None or self._losses:
            self._counted = self._fold()
        return self._counted

    def step_of(self, first: float) -> int | None:
        """The step of a place that :meth:`read` has told, brought to the host; ``None`` if there was none."""
        return self._steps[int(first)] if first < len(self._steps) else None

    def _fold(self) -> tuple[Tensor, Tensor]:
        count, first = self._counted or (
            torch.zeros((), device=self._device, dtype=self._dtype),
            torch.full((), float("inf"), device=self._device, dtype=self._dtype),
        )
        losses, self._losses = self._losses, []
        if not losses:
            return count, first
        bad = ~torch.stack([loss.to(self._device, self._dtype) for loss in losses]).isfinite()
        places = torch.arange(len(self._steps) - len(losses), len(self._steps), device=self._device, dtype=self._dtype)
        return count + bad.sum(), torch.minimum(first, torch.where(bad, places, float("inf")).min())
