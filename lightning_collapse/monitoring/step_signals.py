"""Step signals: loss and gradient norm of every optimizer step, and which of them are bursts, where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
_TENSORS = ("window", "center", "rate", "in_a_row", "logs", "accepted")
COLUMNS = ("loss", "grad_norm", "loss_z", "grad_norm_z", "flag", "nonfinite", "skipped", "accepted")
_FLAG = COLUMNS.index("flag")


class _Step(NamedTuple):
    """What is known of a step that nothing has been made of yet."""

    loss: Tensor | None
    norm: Tensor | None
    squares: Tensor | None
    norms: Tensor | None
    unknown: Tensor | None


class StepSignals:
    r"""Loss and gradient norm of every step of an optimizer, without waiting for the device.

    A step is a burst if the logarithm of its loss or of its norm is far above the median of the 128 steps before, once
    64 of them count:

    .. math:: z = \frac{\log x - \operatorname{med}}{1.4826 \operatorname{MAD}} > \text{threshold}

    which fewer than one step in 100,000 of Gaussian or log-normal noise is. Median and deviation are taken anew every
    eighth step. Steps that are a burst or not finite do not count there, so that one does not hide the next; after
    ``limit`` bursts in a row the next is accepted as the new level, and the window starts anew. A negative loss has no
    logarithm: it is never a burst.

    Who needs no flag at once calls :meth:`note`: eight steps are then judged together, with the same outcome, and a
    step costs a few operations.

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
        self._logs = self._window[:, :0]  # of steps that are not in the window yet
        self._accepted = torch.zeros(0, dtype=torch.bool, device=device)
        self._waiting: list[_Step] = []
        self._kind: list[Any] = []  # of those that wait, alike in all of them
        self._overflows = False
        self._steps: list[int] = []
        self._rows: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._context = 0  # how many of them are of before the last point

    def update(
        self,
        step: int,
        loss: Tensor | None,
        norm: Tensor,
        overflows: bool = False,
        squares: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """Take a step in, and judge it.

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
        self._append(step, _Step(loss, norm, squares, None, unknown), overflows)
        return self._judge()[-1].to(torch.float32)

    def note(self, step: int, loss: Tensor | None, norms: Tensor, overflows: bool = False) -> None:
        """Take a step in that is judged with those that come next, or when it is asked for.

        Args:
            step: Its number, on the host.
            loss: As of :meth:`update`; nobody may write into it.
            norms: Gradient norms of the parameters, shape ``(P,)``, unscaled and before clipping.
            overflows: As of :meth:`update`.
        """
        self._append(step, _Step(loss, None, None, norms, None), overflows)
        if len(self._accepted) + len(self._waiting) >= REFRESH:
            self._judge()

    def pop(self) -> tuple[list[int], Tensor]:
        """Numbers of the steps since the last call, and what they were, shape ``(steps, 8)``: :data:`COLUMNS`."""
        self._judge()
        steps, rows = self._steps[-MOST:], torch.cat([self._window.new_zeros(len(COLUMNS), 0), *self._rows], dim=1)
        self._steps, self._rows = [], []
        return steps, rows.T[-MOST:]

    def pop_squares(self) -> Tensor | None:
        """Squared gradient norms around the first flagged step since the last call; call it before :meth:`pop`.

        Returns:
            Shape ``(8, P)``: the step itself is last, NaN where there was no step so long before it; all NaN if no step
            was flagged, ``None`` if none was given. Of more than 256 steps the last count.
        """
        self._judge()
        if not self._squares or any(one.shape[1] != self._squares[-1].shape[1] for one in self._squares):
            self._squares = []
            return None
        squares = torch.cat(self._squares)[-KEPT:]
        flags = torch.cat(self._rows, dim=1)[_FLAG] if self._rows else squares.new_zeros(0)
        count = min(len(squares) - self._context, len(flags))
        marks = squares.new_zeros(len(squares))
        if count > 0:
            marks[-count:] = flags[-count:].to(marks)
        places = marks.argmax() - torch.arange(RING - 1, -1, -1, device=marks.device)
        there = (places >= 0) & marks.any()
        self._squares = [squares[max(len(squares) - RING + 1, 0) :].clone()]
        self._context = len(self._squares[0])
        return torch.where(there[:, None], squares[places.clamp_min(0)], torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors, numbers and lists."""
        self._judge()
        return {
            **{name: getattr(self, f"_{name}").clone() for name in _TENSORS},
            "steps": list(self._steps),
            "rows": [rows.clone() for rows in self._rows],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        device = self._window.device
        for name in _TENSORS:
            setattr(self, f"_{name}", state_dict[name].to(device))
        self._steps = list(state_dict["steps"])
        self._rows = [rows.to(device) for rows in state_dict["rows"]]

    def _append(self, step: int, one: _Step, overflows: bool) -> None:
        kind = [overflows, *(x if x is None else (x.shape, x.dtype, x.device) for x in one)]
        if kind != self._kind:
            self._judge()
        self._kind, self._overflows = kind, overflows
        self._steps.append(step)
        self._waiting.append(one)

    @torch.no_grad()
    def _judge(self) -> Tensor:
        """Flags of the steps that wait, shape ``(steps,)``."""
        if not self._waiting:
            return self._accepted[:0]
        values, finite, has_loss = self._read()
        logs = torch.where(finite, (values + TINY).log(), torch.nan)  # of what is negative there is none either
        scores = (logs - self._center[:, None]) * self._rate[:, None]
        burst = (scores > self.threshold).any(dim=0)
        nonfinite = ~_of(finite, has_loss, self._overflows)
        in_a_row = self._runs(burst & ~nonfinite)
        accepted = in_a_row > self.limit
        if len(accepted) > 1:  # what comes behind is compared with nothing
            behind = accepted.long().cumsum(0) > accepted
            scores, in_a_row = torch.where(behind, torch.nan, scores), in_a_row * ~behind
            burst, accepted = burst & ~behind, accepted & ~behind
        bad = burst | nonfinite
        flags = bad & ~accepted
        self._in_a_row = (in_a_row * ~accepted)[-1]
        self._center = torch.where(accepted.any(), torch.nan, self._center)
        self._logs = torch.cat([self._logs, torch.where(bad, torch.nan, logs)], dim=1)
        self._accepted = torch.cat([self._accepted, accepted])
        if len(self._accepted) >= REFRESH:
            self._refresh()
        skipped = flags if self.skips else torch.zeros_like(flags)
        marks = torch.stack([flags, nonfinite, skipped, accepted])
        self._rows.append(torch.cat([values, scores, marks.to(values)]))
        while len(self._steps) - self._rows[0].shape[1] >= MOST:
            del self._steps[: self._rows.pop(0).shape[1]]
        return flags

    def _read(self) -> tuple[Tensor, Tensor, bool]:
        """Loss and norm of the steps that wait, ``(2, steps)``, what counts as finite, and whether losses are known."""
        losses, whole, squares, norms, unknown = zip(*self._waiting, strict=True)
        self._waiting, like = [], self._window
        if norms[0] is not None:
            of_parts = torch.stack(norms).to(like).square()
            self._keep(of_parts)
            norm = of_parts.sum(dim=1).sqrt()
        else:
            norm = torch.stack(whole).detach().to(like)
            if squares[0] is not None:
                self._keep(torch.stack(squares).detach())
        has_loss = losses[0] is not None
        loss = torch.stack(losses).detach().to(like) if has_loss else torch.full_like(norm, torch.nan)
        values = torch.stack([loss, norm])
        finite = values.isfinite()
        if unknown[0] is not None:
            nothing = torch.stack(unknown)
            values, finite = torch.where(nothing, torch.nan, values), finite | nothing
        return values, finite, has_loss

    def _keep(self, squares: Tensor) -> None:
        """Have squared norms of the parameters, shape ``(steps, P)``, for the burst that may come."""
        self._squares.append(squares)
        while sum(map(len, self._squares)) - len(self._squares[0]) >= KEPT:
            self._context = max(self._context - len(self._squares.pop(0)), 0)

    def _runs(self, burst: Tensor) -> Tensor:
        """Of every step that waits how many bursts in a row it ends, those before it too."""
        if len(burst) == 1:
            return (self._in_a_row + 1) * burst
        places = torch.arange(len(burst), device=burst.device)
        # the last step before each that is none
        since = torch.where(~burst & (places[:, None] >= places), places, -1).amax(dim=1)
        return places - since + self._in_a_row * (since < 0)

    def _refresh(self) -> None:
        """Let the latest steps into the window, those before a level was accepted out of it, and compare with that."""
        logs, accepted = self._logs, self._accepted
        self._logs, self._accepted = logs[:, :0], accepted[:0]
        after = accepted.flip(0).cumsum(0).flip(0) == 0
        older = torch.where(accepted.any(), torch.nan, self._window[:, len(after) :])
        self._window = torch.cat([older, torch.where(after, logs, torch.nan)], dim=1)
        known = self._window.isfinite().sum(dim=1) >= FEWEST
        median = nan_median(self._window, dim=1)
        deviation = nan_median((self._window - median[:, None]).abs(), dim=1)
        scale = torch.maximum(NORMAL_MAD * deviation, 1e-6 * (1 + median.abs()))
        self._center, self._rate = torch.where(known, median, torch.nan), 1 / scale


def _of(finite: Tensor, has_loss: bool, overflows: bool) -> Tensor:
    """Whether what counts of the loss and of the norm is finite, of every step."""
    if has_loss and not overflows:
        return finite.all(dim=0)
    return torch.ones_like(finite[0]) if not has_loss and overflows else finite[int(not has_loss)]
