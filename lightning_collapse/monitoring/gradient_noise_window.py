"""Gradient noise window: what the micro-batches of one accumulated optimizer step tell about the noise."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.functional.gradient_noise import gradient_coherence, gradient_noise_scale
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.gradients import gradients_of, squared_norms
from lightning_collapse.utilities.private_torch import foreach


class Noise(NamedTuple):
    """Readings of one accumulation window.

    Attributes:
        trace: Estimate of the noise in the gradient of one sample; NaN if the window was too short.
        signal: Estimate of the squared norm of the true gradient; may be negative.
        coherence: How far the micro-batches agree; NaN if fewer than two could be told apart.
        samples: Samples in the window, over all processes.
    """

    trace: float
    signal: float
    coherence: float
    samples: int


class GradientNoiseWindow:
    """Follows the accumulated gradient through one window and takes it apart again.

    After each backward pass the gradient has grown by that of the micro-batch, so a copy of what it was before gives
    the norm of the difference. The copy is of the size of the gradients and lives as long as this object. Sparse
    gradients are left out.

    Data-parallel training adds up what processes have accumulated in the last backward pass of a window, which
    therefore cannot be taken apart: there the earlier ones count, each on its own process.

    Args:
        parameters: Whose gradients to follow.
        device: Where sums are kept.
    """

    SIZE = 5
    """Numbers in :meth:`statistics`."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters = parameters
        self._device = device
        self._previous: dict[int, Tensor] = {}
        self._apart, self._together, self._final = squared_norms([torch.zeros(1)] * 3, device).unbind()
        self._inverse: list[float] = []  # one over the size of every micro-batch
        self._told = 0  # how many of them were told apart
        self._local = False

    @torch.no_grad()
    def add(self, size: int, synchronized: bool, scale: Tensor | None, last: bool) -> None:
        """Read the gradients after a backward pass.

        Args:
            size: Samples in the micro-batch on this process.
            synchronized: Whether processes have just averaged what each of them had accumulated.
            scale: Factor by which the loss was scaled.
            last: Whether no further micro-batch follows.
        """
        unscale = 1.0 if scale is None else 1 / scale.to(self._apart).square()
        found = gradients_of(self._parameters, sparse=False)  # other rows in every micro-batch: no difference to take
        shares = torch.tensor(found.shares, dtype=self._apart.dtype).to(self._device, non_blocking=True)
        self._final = squared_norms(found.tensors, self._device) @ shares * unscale
        self._inverse.append(1 / max(size, 1))
        if synchronized:
            self._local = True
            return
        self._told += 1
        self._together = self._final
        grown = [i in self._previous for i in found.indices]
        old = [self._previous[i] for i, known in zip(found.indices, grown, strict=True) if known]
        new = [tensor for tensor, known in zip(found.tensors, grown, strict=True) if known]
        if old:
            foreach.sub_(old, new)  # the sign does not matter
        of_batch = [self._previous.get(i, tensor) for i, tensor in zip(found.indices, found.tensors, strict=True)]
        self._apart = self._apart + squared_norms(of_batch, self._device) @ shares * unscale
        if last:
            self._previous.clear()
            return
        if old:
            foreach.copy_(old, new)
        for i, tensor in zip(found.indices, found.tensors, strict=True):
            if i not in self._previous:
                self._previous[i] = tensor.clone()

    def statistics(self) -> Tensor:
        """What to sum over processes, shape ``(5,)``, for :meth:`noise`."""
        told = self._inverse[: self._told]
        sizes = torch.tensor([sum(told), sum(self._inverse)], dtype=self._apart.dtype).to(self._device)
        return torch.cat([torch.stack([self._apart, self._together, self._final]), sizes])

    def noise(self, statistics: Sequence[float], accumulate: int) -> Noise:
        """Readings from the summed statistics.

        Args:
            statistics: Sums over processes of :meth:`statistics`.
            accumulate: What Lightning divided the losses by.
        """
        ranks, batches, told = world_size(), len(self._inverse), max(self._told, 1)
        numbers = torch.tensor(statistics, dtype=torch.float64)  # on the host: what follows waits for no device
        # E |g|^2 = |G|^2 + tr / b: of unequal batches 1 / b is averaged
        small = numbers[0] * accumulate**2 / told, numbers[3] / (told * ranks * (1 if self._local else ranks))
        big = numbers[2] * (accumulate / max(batches, 1)) ** 2, numbers[4] / max(ranks * batches, 1) ** 2
        usable = self._told > 0 and bool(small[1] > big[1])
        estimate = gradient_noise_scale(small[0], big[0], 1 / small[1], 1 / big[1])
        return Noise(
            trace=estimate.trace.item() if usable else nan,
            signal=estimate.signal.item() if usable else nan,
            coherence=gradient_coherence(numbers[1], numbers[0], self._told).item() if self._told > 1 else nan,
            samples=round(1 / big[1].item()) if batches else 0,
        )
