"""Step frame: the calls of one training step, and the extremes of all that they pass on, in order of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_collapse.functional.non_finite import extremes

STEP = "training_step"
"""Name of the outermost call, which all others are inside of."""
WEIGHT, BUFFER, INPUT, OUTPUT = "weight", "buffer", "input", "output"
INSIDE = "inside"
"""What a module computes in a narrow format and passes on to none, and what that is made from."""
PASSED_ON = (INPUT, OUTPUT, INSIDE)
GRADIENT, WEIGHT_GRADIENT = "gradient", "weight gradient"
Key = tuple[str, int, str, str]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: Clean name of the module, :data:`STEP` for the training step itself.
        kind: Name of its class.
        nth: How many calls of it there were before in the step.
        parent: Index of the call that it is inside of; -1 for the outermost.
        done: How many calls had ended before it; -1 while it runs.
    """

    name: str
    kind: str
    nth: int = 0
    parent: int = -1
    done: int = -1


@dataclass
class Entry:
    """Something that was measured, once for each tensor.

    Attributes:
        role: What it is: :data:`INPUT` or :data:`OUTPUT` where it was first seen, a gradient of such, a weight.
        call: Index of the call where it was first seen; -1 for weights.
        label: Which of several it is; of weights their name.
        dtype: Its type.
        terms: Its width, the last dimension.
        producers: Indices of all calls that returned it.
        consumers: Indices of all calls that received it.
        of: Of a gradient the index of the entry of the tensor.
        operands: Of what a function made :data:`INSIDE` a module the entries of what it was made from.
    """

    role: str
    call: int
    label: str
    dtype: torch.dtype
    terms: int = 1
    producers: list[int] = field(default_factory=list)
    consumers: list[int] = field(default_factory=list)
    of: int = -1
    operands: list[int] = field(default_factory=list)


@dataclass
class Frame:
    """What was measured in one step; numbers lie on the device until :meth:`to_host`.

    Attributes:
        step: Of the training.
        calls: In the order in which they began.
        entries: In order of time, weights first.
        bad: Whether the loss, a weight or the gradient of a weight is NaN or infinite; 0-dimensional, on the device.
        raised: Whether the step ended in an exception.
    """

    step: int
    calls: list[Call] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    bad: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))
    raised: bool = False
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _judged: list[int] = field(default_factory=list)
    _order: list[int] = field(default_factory=list)
    _stack: Tensor | None = None

    def add(self, entry: Entry, tensor: Tensor, judged: bool = False) -> int:
        """Measure a tensor; returns the index of its entry."""
        self.entries.append(entry)
        self._pairs.append(extremes(tensor))
        if judged:
            self._judged.append(len(self.entries) - 1)
        return len(self.entries) - 1

    def judge(self, index: int) -> None:
        """Count an entry among those that make a frame bad."""
        self._judged.append(index)

    def close(self, device: torch.device) -> None:
        """Bring all numbers into one piece of memory; nothing waits for them."""
        if self._judged:
            self.bad = ~_stacked([self._pairs[i] for i in self._judged], device)[0].isfinite().all()
        if self._pairs:
            self._stack, self._order = _stacked(self._pairs, device)
        self._pairs = []

    def largest(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Magnitudes of what modules have passed on, and the largest number of the type of each; at points only."""
        if self._stack is None:
            return torch.zeros(0, device=device), torch.ones(0, device=device)
        sizes = torch.maximum(-self._stack[0], self._stack[1])
        entries = [self.entries[i] for i in self._order]
        limits = [torch.finfo(e.dtype).max if e.role in PASSED_ON else torch.inf for e in entries]
        return sizes, torch.tensor(limits, dtype=sizes.dtype, device=device)

    def to_host(self) -> list[tuple[float, float]]:
        """Smallest and largest number of every entry. Waits for the device."""
        if self._stack is None:
            return []
        least, largest = self._stack.tolist()
        found = dict(zip(self._order, zip(least, largest, strict=True), strict=True))
        return [found[i] for i in range(len(self.entries))]

    def key(self, index: int) -> Key:
        """What tells an entry from the others of its step, and is the same in other steps."""
        entry = self.entries[index]
        if entry.of >= 0:
            return (*self.key(entry.of)[:2], GRADIENT, entry.label)
        call = self.calls[entry.call] if entry.call >= 0 else Call("", "")
        return call.name, call.nth, entry.role, entry.label


@torch.no_grad()
def _stacked(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Pairs in the columns of a matrix ``(2, len(pairs))``, those of one type side by side, and which is where."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (least, _) in enumerate(pairs):
        groups.setdefault((least.device, least.dtype), []).append(i)
    double = device.type != "mps" and any(dtype is torch.float64 for _, dtype in groups)
    wide = torch.float64 if double else torch.float32
    parts = [torch.stack([pairs[i][side] for side in (0, 1) for i in group]) for group in groups.values()]
    matrix = torch.cat([part.view(2, -1).to(device, wide) for part in parts], dim=1)
    return matrix, [i for group in groups.values() for i in group]
