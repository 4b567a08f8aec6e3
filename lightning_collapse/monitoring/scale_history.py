"""Loss scale history: how often a gradient scaler has halved its scale of late, told without waiting for it."""

from __future__ import annotations

from collections import deque
from math import inf, isnan

import torch
from torch import Tensor

_STEPS = 100
_MOST = 5


class ScaleHistory:
    """The loss scale at the latest hundred steps, where it lies.

    A scaler looks for its scale by raising it until gradients overflow; it is a failure if the scale falls more than
    five times within 100 steps, or reaches 1.

    Example:
        >>> scales = ScaleHistory()
        >>> for step in range(7):
        ...     scales.note(torch.tensor(2.0**-step))
        >>> [float(x) for x in scales.read(torch.device("cpu"))], scales.is_failure(6, 2.0**-6)
        ([6.0, 0.015625], True)
    """

    def __init__(self) -> None:
        self._scales: deque[Tensor] = deque(maxlen=_STEPS + 1)

    def note(self, scale: Tensor | None) -> None:
        """Keep a copy of the scale of a step; ``None`` where there is none."""
        if scale is not None:
            self._scales.append(scale.detach().clone())

    def read(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How often it fell, and what it is, on the device; NaN where there is none."""
        if not self._scales:
            nothing = torch.full((), torch.nan, device=device)
            return nothing, nothing
        scales = torch.stack([scale.to(device, torch.float32) for scale in self._scales])
        return (scales[1:] < scales[:-1]).sum().to(torch.float32), scales[-1]

    @staticmethod
    def is_failure(halvings: float, scale: float) -> bool:
        """Whether the scale has fallen too often or too far."""
        return not isnan(halvings) and halvings < inf and (halvings > _MOST or (halvings > 0 and scale <= 1))

    def state_dict(self) -> dict[str, Tensor]:
        """The scales, as one tensor."""
        return {"scales": torch.stack(list(self._scales))} if self._scales else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was called."""
        self._scales.extend(state["scales"].unbind() if "scales" in state else ())
