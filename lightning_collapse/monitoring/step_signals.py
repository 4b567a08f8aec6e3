"""Step signals: loss and gradient norm of every optimizer step, and which of them are bursts, where they lie."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import accumulation_dtype

WINDOW, FEWEST = 128, 64
"""Steps that a burst is compared with, and before which there is none: of 16 to 32 steps of Gaussian noise up to 3 % of
runs of 100 steps hold one, of Student-t(3) noise up to 30 %."""
NORMAL_MAD = 1.4826
"""Standard deviations of Gaussian noise per median absolute deviation."""
RING = 8
"""Steps whose gradient norms are kept for every parameter."""
MOST = 4096
"""Steps between two points that are kept."""
COLUMNS = ("loss", "grad_norm", "loss_z", "grad_norm_z", "flag", "nonfinite", "skipped", "accepted")


class StepSignals:
    r"""Loss and gradient norm of every step of an optimizer, without waiting for the device.

    A step is a burst if the logarithm of its loss or of its norm is far above the median of the 128 accepted steps
    before it, from the 65th on:

    .. math:: z = \frac{\log x - \operatorname{med}}{1.4826 \operatorname{MAD}} > \text{threshold}

    which fewer than one step in 100,000 of Gaussian or log-normal noise is. Steps that are a burst or not finite do
    not enter the window, so that one does not hide the next; after ``limit`` bursts in a row the
    next is accepted as the new level, and the window starts anew. A negative loss has no logarithm: it is never a
    burst.

    Args:
        device: Where the losses and gradients are.
        threshold: Robust standard deviations above which a step is a burst.
        limit: Bursts in a row after which the next is accepted.

    Attributes:
        skips: Whether flagged steps are skipped, and counted so.

    Example:
        >>> signals = StepSignals(torch.device("cpu"))
        >>> for step in range(80):
        ...     noise = torch.tensor(0.01 * (step * 7 % 5))
        ...     _ = signals.update(step, 2 + noise, 1 + noise)
        >>> signals.update(80, torch.tensor(2.0), torch.tensor(50.0)), signals.update(81, torch.tensor(2.0), 1 + noise)
        (tensor(1.), tensor(0.))
    """

    def __init__(self, device: torch.device, threshold: float = 6.0, limit: int = 8) -> None:
        self.threshold, self.limit, self.skips = threshold, limit, False
        self._window = torch.full((2, WINDOW), torch.nan, dtype=accumulation_dtype(device), device=device)
        self._in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self._records: deque[tuple[int, Tensor]] = deque(maxlen=MOST)
        self._ring: Tensor | None = None
        self._kept: Tensor | None = None
        self._has_kept = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(
        self, step: int, loss: Tensor | None, norm: Tensor, overflows: bool = False, squares: Tensor | None = None
    ) -> Tensor:
        """Take a step in.

        Args:
            step: Its number, on the host.
            loss: 0-dimensional, the mean over processes and accumulated batches; ``None`` where it is not known.
            norm: 0-dimensional, of the whole gradient, over all processes, unscaled and before clipping.
            overflows: Whether the gradient carries the factor of a scaler, which deals with an infinite one itself.
            squares: Squared gradient norms of the parameters, shape ``(P,)``, to be kept if the step is a burst.

        Returns:
            0-dimensional, ``float32``, on the device: exactly 1 if the step is a burst or not finite, else exactly 0.
        """
        known = norm.new_full((), torch.nan) if loss is None else loss.detach()
        values = torch.stack([known.to(self._window), norm.detach().to(self._window)])
        finite = values.isfinite()
        logs = torch.where(finite & (values >= 0), values.clamp_min(1e-12).log(), torch.nan)
        scores = self._scores(logs)
        burst = (scores > self.threshold).any()
        parts = ([] if loss is None else [finite[0]]) + ([] if overflows else [finite[1]])
        nonfinite = ~torch.stack(parts).all() if parts else torch.zeros_like(burst)
        bad = burst | nonfinite
        in_a_row = torch.where(burst & ~nonfinite, self._in_a_row + 1, 0)
        accepted = in_a_row > self.limit
        self._in_a_row = torch.where(accepted, 0, in_a_row)
        flag = (bad & ~accepted).to(torch.float32)
        self._learn(logs, bad, accepted)
        marks = torch.stack([flag, nonfinite.to(flag), flag * self.skips, accepted.to(flag)]).to(values)
        self._records.append((step, torch.cat([values, scores, marks])))
        if squares is not None:
            self._keep(squares, bad)
        return flag

    def pop(self) -> tuple[list[int], Tensor]:
        """Numbers of the steps since the last call, and what they were, shape ``(steps, 8)``: :data:`COLUMNS`."""
        steps = [step for step, _ in self._records]
        rows = [row for _, row in self._records]
        self._records.clear()
        return steps, torch.stack(rows) if rows else self._window.new_zeros(0, len(COLUMNS))

    def pop_squares(self) -> Tensor | None:
        """Squared gradient norms around the first flagged step since the last call.

        Returns:
            Shape ``(8, P)``: the step itself is last, NaN where there was no step so long before it; all NaN if no step
            was flagged, ``None`` if none was given.
        """
        if self._kept is None:
            return None
        kept = torch.where(self._has_kept, self._kept, torch.nan)
        self._has_kept = torch.zeros_like(self._has_kept)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors, numbers and lists."""
        return {
            "window": self._window.clone(),
            "in_a_row": self._in_a_row.clone(),
            "steps": [step for step, _ in self._records],
            "rows": [row.clone() for _, row in self._records],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._window = state_dict["window"].to(self._window)
        self._in_a_row = state_dict["in_a_row"].to(self._in_a_row)
        rows = [row.to(self._window) for row in state_dict["rows"]]
        self._records = deque(zip(state_dict["steps"], rows, strict=True), maxlen=MOST)

    def _scores(self, logs: Tensor) -> Tensor:
        """Robust scores of both, shape ``(2,)``; NaN before there are enough steps to compare with."""
        median = self._window.nanmedian(dim=1).values
        deviation = (self._window - median[:, None]).abs().nanmedian(dim=1).values
        scale = torch.maximum(NORMAL_MAD * deviation, 1e-6 * (1 + median.abs()))
        known = self._window.isfinite().sum(dim=1) >= FEWEST
        return torch.where(known, (logs - median) / scale, torch.nan)

    def _learn(self, logs: Tensor, bad: Tensor, accepted: Tensor) -> None:
        """Let a step into the window, or empty it."""
        longer = torch.cat([self._window[:, 1:], logs[:, None]], dim=1)
        learns = (~bad & logs.isfinite())[:, None]
        window = torch.where(learns, longer, self._window)
        self._window = torch.where(accepted, torch.nan, window)

    def _keep(self, squares: Tensor, bad: Tensor) -> None:
        """Keep the norms of this step and of those before it, if it is the first flagged one."""
        if self._ring is None or self._ring.shape[1] != len(squares):
            self._ring = squares.new_full((RING, len(squares)), torch.nan)
            self._kept = self._ring
            self._has_kept = torch.zeros_like(self._has_kept)
        self._ring = torch.cat([self._ring[1:], squares[None]])
        first = bad & ~self._has_kept
        self._kept = torch.where(first, self._ring, self._kept if self._kept is not None else self._ring)
        self._has_kept = self._has_kept | bad
