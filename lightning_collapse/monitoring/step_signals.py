"""Step signals: loss and gradient norm of every optimizer step, and which of them are bursts, where they lie."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_collapse.spectral.deterministic import nan_median
from lightning_collapse.spectral.precision import accumulation_dtype

WINDOW, FEWEST = 128, 64
"""Steps that a burst is compared with, and before which there is none: of 16 to 32 steps of Gaussian noise up to 3 % of
runs of 100 steps hold one, of Student-t(3) noise up to 30 %."""
NORMAL_MAD = 1.4826
"""Standard deviations of Gaussian noise per median absolute deviation."""
REFRESH = 8
"""Steps after which median and deviation are taken anew: at each they would cost more than all the rest."""
TINY = 1e-12
"""Added before the logarithm, which 0 has none of."""
RING, KEPT = 8, 256
"""Steps around a burst whose gradient norms are told for every parameter, and of how many they are kept until then."""
MOST = 4096
"""Steps between two points that are kept."""
_TENSORS = ("window", "center", "rate", "in_a_row")
COLUMNS = ("loss", "grad_norm", "loss_z", "grad_norm_z", "flag", "nonfinite", "skipped", "accepted")


class StepSignals:
    r"""Loss and gradient norm of every step of an optimizer, without waiting for the device.

    A step is a burst if the logarithm of its loss or of its norm is far above the median of the 128 steps before, once
    64 of them count:

    .. math:: z = \frac{\log x - \operatorname{med}}{1.4826 \operatorname{MAD}} > \text{threshold}

    which fewer than one step in 100,000 of Gaussian or log-normal noise is. Median and deviation are taken anew every
    eighth step. Steps that are a burst or not finite do not count there, so that one does not hide the next; after
    ``limit`` bursts in a row the next is accepted as the new level, and the window starts anew. A negative loss has no
    logarithm: it is never a burst.

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
        self._center = self._rate = torch.full_like(self._window[:, 0], torch.nan)
        self._in_a_row = torch.zeros((), dtype=torch.long, device=device)
        self._staged: list[tuple[Tensor, Tensor]] = []
        self._records: deque[tuple[int, tuple[Tensor, ...]]] = deque(maxlen=MOST)
        self._squares: deque[Tensor] = deque(maxlen=KEPT)
        self._context = 0  # how many of them are of before the last point

    @torch.no_grad()
    def update(
        self,
        step: int,
        loss: Tensor | None,
        norm: Tensor,
        overflows: bool = False,
        squares: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """Take a step in.

        Args:
            step: Its number, on the host.
            loss: 0-dimensional, the mean over processes and accumulated batches; ``None`` where it is not known.
            norm: 0-dimensional, of the whole gradient, over all processes, unscaled and before clipping.
            overflows: Whether the gradient carries the factor of a scaler, which deals with an infinite one itself.
            squares: Squared gradient norms of the parameters, shape ``(P,)``, to be kept if the step is a burst.
            unknown: Whether nothing is known of the step after all; 0-dimensional, boolean.

        Returns:
            0-dimensional, ``float32``, on the device: exactly 1 if the step is a burst or not finite, else exactly 0.
        """
        known = norm.new_full((), torch.nan) if loss is None else loss.detach()
        values = torch.stack([known.to(self._window), norm.detach().to(self._window)])
        finite = values.isfinite()
        if unknown is not None:
            values, finite = torch.where(unknown, torch.nan, values), finite | unknown
        logs = torch.where(finite, (values + TINY).log(), torch.nan)  # of what is negative there is none either
        scores = (logs - self._center) * self._rate
        burst = (scores > self.threshold).any()
        nonfinite = ~(finite.all() if loss is not None and not overflows else _of(finite, loss is not None, overflows))
        in_a_row = (self._in_a_row + 1) * (burst & ~nonfinite)
        accepted = in_a_row > self.limit
        bad = burst | nonfinite
        flag = (bad & ~accepted).to(torch.float32)
        self._in_a_row = in_a_row * ~accepted
        self._center = torch.where(accepted, torch.nan, self._center)
        self._staged.append((torch.where(bad, torch.nan, logs), accepted))
        if len(self._staged) == REFRESH:
            self._refresh()
        self._records.append((step, (values, scores, flag, nonfinite, flag * self.skips, accepted)))
        if squares is not None:
            self._squares.append(squares.detach())
        return flag

    def pop(self) -> tuple[list[int], Tensor]:
        """Numbers of the steps since the last call, and what they were, shape ``(steps, 8)``: :data:`COLUMNS`."""
        steps, rows = [step for step, _ in self._records], self._rows()
        self._records.clear()
        return steps, rows

    def pop_squares(self) -> Tensor | None:
        """Squared gradient norms around the first flagged step since the last call; call it before :meth:`pop`.

        Returns:
            Shape ``(8, P)``: the step itself is last, NaN where there was no step so long before it; all NaN if no step
            was flagged, ``None`` if none was given. Of more than 256 steps the last count.
        """
        if not self._squares or any(len(one) != len(self._squares[-1]) for one in self._squares):
            self._squares.clear()
            return None
        squares, flags = torch.stack(list(self._squares)), [of[2] for _, of in self._records]
        count = min(len(self._squares) - self._context, len(flags))
        marks = squares.new_zeros(len(squares))
        if count:
            marks[-count:] = torch.stack(flags[-count:]).to(marks)
        places = marks.argmax() - torch.arange(RING - 1, -1, -1, device=marks.device)
        there = (places >= 0) & marks.any()
        for _ in range(max(len(self._squares) - RING + 1, 0)):
            self._squares.popleft()
        self._context = len(self._squares)
        return torch.where(there[:, None], squares[places.clamp_min(0)], torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors, numbers and lists."""
        return {
            **{name: getattr(self, f"_{name}").clone() for name in _TENSORS},
            "staged": [[part.clone() for part in one] for one in self._staged],
            "steps": [step for step, _ in self._records],
            "records": [[part.clone() for part in parts] for _, parts in self._records],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        device = self._window.device
        for name in _TENSORS:
            setattr(self, f"_{name}", state_dict[name].to(device))
        self._staged = [(logs.to(device), accepted.to(device)) for logs, accepted in state_dict["staged"]]
        records = [tuple(part.to(device) for part in parts) for parts in state_dict["records"]]
        self._records = deque(zip(state_dict["steps"], records, strict=True), maxlen=MOST)

    def _rows(self) -> Tensor:
        """All records, shape ``(steps, 8)``."""
        if not self._records:
            return self._window.new_zeros(0, len(COLUMNS))
        columns = zip(*(parts for _, parts in self._records), strict=True)
        stacked = [torch.stack(column).to(self._window) for column in columns]
        return torch.cat([part if part.ndim == 2 else part[:, None] for part in stacked], dim=1)

    def _refresh(self) -> None:
        """Let the latest steps into the window, those before a level was accepted out of it, and compare with that."""
        logs = torch.stack([one for one, _ in self._staged], dim=1)
        accepted = torch.stack([accepted for _, accepted in self._staged])
        self._staged.clear()
        after = accepted.flip(0).cumsum(0).flip(0) == 0
        older = torch.where(accepted.any(), torch.nan, self._window[:, len(after) :])
        self._window = torch.cat([older, torch.where(after, logs, torch.nan)], dim=1)
        known = self._window.isfinite().sum(dim=1) >= FEWEST
        median = nan_median(self._window, dim=1)
        deviation = nan_median((self._window - median[:, None]).abs(), dim=1)
        scale = torch.maximum(NORMAL_MAD * deviation, 1e-6 * (1 + median.abs()))
        self._center, self._rate = torch.where(known, median, torch.nan), 1 / scale


def _of(finite: Tensor, has_loss: bool, overflows: bool) -> Tensor:
    """Whether what counts of the loss and of the norm is finite."""
    counts = [finite[i] for i, does in enumerate((has_loss, not overflows)) if does]
    return torch.stack(counts).all() if counts else torch.ones_like(finite[0])
