"""Frame history: step frames since the last point and the healthy ones before, and what made the first NaN in them."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lightning_collapse.functional.non_finite import Cause
from lightning_collapse.monitoring.non_finite_origin import (
    BATCH,
    Origin,
    Reading,
    find_origin,
    least_headroom,
    weights_in_words,
)
from lightning_collapse.monitoring.step_flags import StepFlags
from lightning_collapse.monitoring.step_frame import INPUT, STEP, Frame
from lightning_collapse.utilities.modules import clean_name

KEPT = 8
"""Steps of a table."""
_FRESH = 64
"""Frames that are kept between two points, the first ones, where every step is measured."""


class FrameHistory:
    """Frames in the order of steps; numbers stay on the device until something is not finite.

    Attributes:
        past: Healthy frames up to the last point, at most seven.
        fresh: Frames since then.

    Example:
        >>> history = FrameHistory()
        >>> history.add(Frame(step=0))
        >>> float(history.first_bad(torch.device("cpu"), torch.float64))
        inf
        >>> history.settle(healthy=True)
        >>> len(history.past), history.fresh
        (1, [])
    """

    def __init__(self) -> None:
        self.past: list[Frame] = []
        self.fresh: list[Frame] = []

    @property
    def is_empty(self) -> bool:
        """Whether there is no frame yet to compare with."""
        return not (self.past or self.fresh)

    def add(self, frame: Frame | None) -> None:
        """Take in a closed frame."""
        if frame is not None and len(self.fresh) < _FRESH:
            self.fresh.append(frame)

    def settle(self, healthy: bool) -> None:
        """A point has been made; frames of a failure are dropped."""
        self.past, self.fresh = (self.past + self.fresh)[1 - KEPT :] if healthy else self.past, []

    def first_bad(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Place of the first bad frame since the last point, infinite if there is none; on the device."""
        never = torch.full((), inf, device=device, dtype=dtype)
        if not self.fresh:
            return never
        bad = torch.stack([frame.bad.to(device) for frame in self.fresh])
        return torch.where(bad, torch.arange(len(bad), device=device, dtype=dtype), never).min()

    def bits(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Bits that the largest number of the latest step may grow in its format, infinite if nothing is known."""
        never = torch.full((1,), inf, device=device, dtype=dtype)
        frame = next((frame for frame in reversed(self.fresh) if len(frame.calls) > 1), None)
        if frame is None:
            return never[0]
        sizes, limits = frame.largest(device)
        grow = limits.to(dtype).log2() - sizes.to(dtype).log2()
        return torch.cat([torch.where(sizes.isfinite() & (sizes > 0), grow, inf), never]).min()

    def origin(self, first_bad: float, first_flag: float, flags: StepFlags) -> Origin | None:
        """What made the first NaN since the last point, as far as this process knows. Waits for the device.

        Args:
            first_bad: Place of the first bad frame, infinite for none.
            first_flag: Place of the first loss or gradient that was not finite, on any process, infinite for none.
            flags: What all steps said of themselves, on this process.
        """
        bad = self.fresh[int(first_bad)] if first_bad < len(self.fresh) else None
        flagged = flags.step_of(first_flag)
        if bad is not None and (flagged is None or bad.step <= flagged):
            now = Reading(bad)
            found = None if now.healthy else find_origin(now, self.before(bad))
            if found is not None or bool(bad.bad):
                words = "no module that is listened to made it; what is compiled is looked into by `replay=True` alone"
                return found or Origin(bad.step, Cause.UNSEEN, STEP, words)
        _, loss, gradient, batch = flags.read().tolist()
        if flagged is None or first_flag < min(loss, gradient):  # on another process
            return None
        return self._unseen(flagged, flags, batch == first_flag, loss <= gradient)

    def before(self, frame: Frame | None = None) -> list[Reading]:
        """The latest frames before one, or before now, that its table shows."""
        known = [*self.past, *self.fresh]
        end = len(known) if frame is None else next(i for i, other in enumerate(known) if other is frame)
        return [Reading(other) for other in known[:end][1 - KEPT :]]

    def _unseen(self, step: int, flags: StepFlags, has_batch: bool, has_loss: bool) -> Origin:
        """Between two frames: what the step said of itself, what was nearest to overflow, and the weights by now."""
        before = [Reading(frame) for frame in (*self.past, *self.fresh) if frame.step < step][-KEPT:]
        while before and not before[-1].healthy:
            before.pop()
        weights = weights_in_words(Reading(self.fresh[-1])) if self.fresh else ""
        seen = f"; all was finite at step {before[-1].frame.step}" if before else ""
        told = f"; by now {weights}" if weights else ""
        if has_batch and not any(_holds_bad_batch(reading) for reading in before):
            origin = Origin(step, Cause.DATA, BATCH, "the batch holds it already, as none before it did", 0, 0)
        else:
            words = "that step was not looked at: " + (_of_loss(flags) if has_loss else _of_gradients(flags, before))
            origin = Origin(step, Cause.UNSEEN, STEP, words, phase=0 if has_loss else 2)
        more = "repeats such a step at once and names the module" if origin.cause != Cause.DATA else "shows where"
        origin.words += f"{seen}{told}. `FirstNonFinite(replay=True)` {more}"
        if before:
            origin.steps, origin.rows = least_headroom(before[-1], before[:-1])
        return origin


def _owner(name: str) -> str:
    """The module of a parameter, as calls are named."""
    return clean_name(name.rpartition(".")[0])


def _of_loss(flags: StepFlags) -> str:
    known = "from weights whose gradients were finite" if flags.has_gradients else "or the update before"
    return f"its forward pass made it, {known}"


def _of_gradients(flags: StepFlags, before: list[Reading]) -> str:
    """Of a finite loss: the forward pass may hold NaN that the loss leaves out."""
    called = [call.name for call in before[-1].frame.calls] if before else []
    places = {name: i for i, name in enumerate(called)}
    bad = flags.bad_gradients()
    first = clean_name(max(bad, key=lambda name: places.get(_owner(name), -1)))
    count = f"{len(bad)} of {len(flags.parameters)} that are looked at"
    return f"its loss is finite, and gradients of weights are not, {count}, that of `{first}` first"


def _holds_bad_batch(reading: Reading) -> bool:
    """Whether a batch that did no harm was not finite either."""
    entries = enumerate(reading.frame.entries)
    return any(e.role == INPUT and e.call == 0 and not reading.pairs[i][1] < inf for i, e in entries)
