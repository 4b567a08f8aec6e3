"""Origin of a NaN or an infinity: the module that made the first one of a step, producer told from propagator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, isnan, nan

import torch

from lightning_collapse.functional.non_finite import Cause, absolute_maximum, bits_of_headroom, producer_cause
from lightning_collapse.monitoring.step_frame import (
    BUFFER,
    GRADIENT,
    INPUT,
    INSIDE,
    OUTPUT,
    PASSED_ON,
    STEP,
    WEIGHT,
    WEIGHT_GRADIENT,
    Entry,
    Frame,
    Key,
)
from lightning_collapse.utilities.distributed import from_all_processes, process_rank

ROWS = 21
"""Rows of a table, as many calls as the reference of the field shows."""
BATCH = "batch"
"""What stands for the module where the data hold it already."""
Pairs = Sequence[tuple[float, float]]


@dataclass
class Row:
    """One line of the table: a tensor that was passed on.

    Attributes:
        call: How many calls had ended before the one that it belongs to; -1 for what was never finished, or a weight.
        module: Name of the module.
        kind: Its class.
        what: ``"output"``, ``"input"``, ``"gradient"`` and so on.
        values: Its largest magnitudes in the steps of the table, NaN where it was not there.
        dtype: Its type.
        headroom: Bits that the latest finite one of them may grow.
        verdict: What is said of it; empty for nothing.
    """

    call: int
    module: str
    kind: str
    what: str
    values: list[float]
    dtype: str
    headroom: float
    verdict: str = ""


@dataclass
class Origin:
    """What made the first NaN or infinity of a step.

    Attributes:
        step: Of the training.
        cause: What kind of failure it is.
        layer: Name of the module that made it; :data:`BATCH` for the data.
        words: A sentence, without the dot at its end.
        call: How many calls had ended before that of the module; -1 where that is not known.
        phase: 0 in the forward pass, 1 in the backward pass, 2 in a gradient of a weight alone, 3 in none.
        rank: Process that it was found on.
        steps: Steps of the columns of the table, the latest last.
        rows: The table.
    """

    step: int
    cause: Cause
    layer: str
    words: str
    call: int = -1
    phase: int = 3
    rank: int = 0
    steps: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Smaller for what came first, over steps, phases, calls and processes."""
        return self.step, self.phase, self.call if self.call >= 0 else 1 << 40, self.rank


class Reading:
    """A closed frame with its numbers on the host.

    Args:
        frame: The frame; waits for the device.

    Attributes:
        healthy: Whether loss, weights and gradients of weights are finite in it.
        sizes: Largest magnitude of every entry.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame, self.pairs = frame, frame.to_host()
        self.healthy = not bool(frame.bad) and not frame.raised
        self.sizes = [absolute_maximum(*pair) for pair in self.pairs]
        self.by_key: dict[Key, int] = {}
        for i in range(len(self.sizes)):
            self.by_key.setdefault(frame.key(i), i)


def find_origin(now: Reading, earlier: Sequence[Reading] = ()) -> Origin | None:
    """What made the first NaN or infinity of a frame; ``None`` if it holds none.

    Time decides: of all that was passed on, in the order in which it was, the first that is not finite was made by the
    call that returned it, or, if it is first seen as the input of a call, between calls by the module around it. In the
    backward pass it was made by the call that received the tensor, whose own gradient was finite, or where no module
    did by the one around. What was infinite in a healthy step too, as masks are, is left out.

    Args:
        now: The frame.
        earlier: Those before it, in order.

    Example:
        >>> from lightning_collapse.monitoring.call_frames import CallFrames
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
        >>> _ = torch.nn.init.constant_(net[2].weight, torch.nan)
        >>> frames = CallFrames(net)
        >>> frames.open(step=7)
        >>> frames.armed = True
        >>> frames.end(net(torch.ones(1, 2)).sum())
        >>> origin = find_origin(Reading(frames.close()))
        >>> origin.layer, origin.call, origin.cause.words
        ('2', 2, 'an earlier update')
    """
    return _Search(now, earlier).origin()


def least_headroom(now: Reading, earlier: Sequence[Reading] = ()) -> tuple[list[int], list[Row]]:
    """Steps and rows of a table of what is nearest to the largest number of its type, in order of time."""
    search = _Search(now, earlier)
    entries = [i for i, e in enumerate(now.frame.entries) if e.role in PASSED_ON and isfinite(now.sizes[i])]
    entries.sort(key=lambda i: bits_of_headroom(now.sizes[i], _limit(now.frame.entries[i])))
    return search.steps, [search.row(i) for i in sorted(entries[:ROWS])]


def first_of_processes(origin: Origin | None) -> Origin | None:
    """Of what the processes have found the one that came first. Collective."""
    if origin is not None:
        origin.rank = process_rank()
    return min(
        (found for found in from_all_processes(origin) if found is not None),
        key=lambda found: found.order,
        default=None,
    )


class _Search:
    def __init__(self, now: Reading, earlier: Sequence[Reading]) -> None:
        self.now, self.frame, self.earlier = now, now.frame, list(earlier)
        self.steps = [reading.frame.step for reading in (*earlier, now)]
        self.known = {key for of in earlier if of.healthy for key in of.by_key}
        self.usual = {
            key
            for of in earlier
            for key, i in of.by_key.items()
            if of.healthy and key[2] in PASSED_ON and not isfinite(of.sizes[i])
        }

    def origin(self) -> Origin | None:
        passed = [i for i, entry in enumerate(self.frame.entries) if entry.role not in (WEIGHT, BUFFER)]
        first = next((i for i in passed if self._is_bad(i)), None)
        weights = [i for i, e in enumerate(self.frame.entries) if e.role == WEIGHT and not isfinite(self.now.sizes[i])]
        if first is None:
            return self._of_weights(weights) if weights else None
        entry = self.frame.entries[first]
        if entry.role == WEIGHT_GRADIENT:
            module = entry.label.rpartition(".")[0] or STEP
            words = f"the gradient of `{entry.label}` is not finite, and all that came before it is"
            return self._made(first, Origin(self.frame.step, Cause.BACKWARD, module, words, phase=2))
        return self._of_backward(first, entry) if entry.role == GRADIENT else self._of_forward(first, entry)

    def _is_bad(self, i: int) -> bool:
        least, largest = self.now.pairs[i]
        key = self.frame.key(i)
        if (isfinite(least) and isfinite(largest)) or key in self.usual:
            return False
        # minus infinity alone, going in or inside, is a mask, unless it was something else before, or is an overflow
        masked = key[2] == INPUT or (key[2] == INSIDE and self._cause(self.frame.entries[i].call, i) != Cause.OVERFLOW)
        return isnan(least) or largest == inf or key in self.known or not masked

    def _of_forward(self, first: int, entry: Entry) -> Origin:
        step = self.frame.step
        if entry.role == INPUT and entry.call == 0:
            words = f"tensor {entry.label} of the batch holds it already"
            return self._made(first, Origin(step, Cause.DATA, BATCH, words, 0, 0))
        call = self.frame.calls[entry.call].parent if entry.role == INPUT else entry.call
        name = self._name(call)
        between = f" between its modules, before `{self._name(entry.call)}`," if entry.role == INPUT else ""
        between = f" inside, {entry.label}," if entry.role == INSIDE else between
        own = self._own_weights(call, first)
        if own:
            labels = f"`{own[0]}`" + (f" and {len(own) - 1} more" if len(own) > 1 else "")
            words = f"what it received is finite and its weights are not: {labels}, made by an earlier update"
            return self._made(first, Origin(step, Cause.UPDATE, name, words, self._index(call), 0))
        operand, _, weight = self._operands(call, first)
        cause, before = self._cause(call, first), self._before(first)
        unseen = cause is Cause.UNDEFINED and not isnan(self.now.sizes[first])  # what modules pass on is seen alone
        made = "NaN" if isnan(self.now.sizes[first]) else "infinity"
        words = (
            f"{made} was made{between} from finite numbers up to {operand:.3g}"
            + (f" and weights up to {weight:.3g}" if weight else "")
            + (f", after {before:.3g} in the steps before," if cause is Cause.OVERFLOW and before else "")
            + f" in {_short(entry.dtype)}"
            + (", by a division by 0, a logarithm of 0, or numbers in between" if unseen else "")
        )
        return self._made(first, Origin(step, cause, name, words, self._index(call), 0))

    def _cause(self, call: int, first: int) -> Cause:
        """What made the first that is not finite, in a call whose weights are."""
        operand, terms, weight = self._operands(call, first)
        limit = _limit(self.frame.entries[first])
        return producer_cause(self.now.sizes[first], operand, weight, terms, limit, self._before(first))

    def _before(self, first: int) -> float:
        """The largest magnitude of the same tensor in earlier steps."""
        key = self.frame.key(first)
        known = [of.sizes[of.by_key[key]] for of in self.earlier if key in of.by_key]
        return max(filter(isfinite, known), default=0.0)

    def _of_backward(self, first: int, entry: Entry) -> Origin:
        tensor = self.frame.entries[entry.of]
        inner = [c for c in tensor.consumers if c > 0]
        if inner:
            call = inner[-1]
            others = [c for c in inner if c != call and not self._is_inside(call, c)]
            also = f", or that of {', '.join(f'`{self._name(c)}`' for c in others)}," if others else ""
            words = f"its backward pass{also} made it: the gradient of what it received is the first that is not finite"
        else:
            outermost = min(tensor.producers, default=tensor.call)
            call = max(self.frame.calls[outermost].parent, 0) if tensor.producers else tensor.call
            words = (
                f"its backward pass made it between its modules: the gradient of what `{self._name(outermost)}`"
                " returned is the first that is not finite"
            )
        return self._made(first, Origin(self.frame.step, Cause.BACKWARD, self._name(call), words, self._index(call), 1))

    def _of_weights(self, bad: Sequence[int]) -> Origin:
        label = self.frame.entries[bad[0]].label
        words = f"{self.told(bad)}, and nothing that a module passed on does"
        origin = Origin(self.frame.step, Cause.UPDATE, label.rpartition(".")[0] or STEP, words)
        origin.steps, origin.rows = self.steps, [self.row(i, "not finite") for i in bad[:ROWS]]
        return origin

    def told(self, bad: Sequence[int]) -> str:
        count = sum(entry.role == WEIGHT for entry in self.frame.entries)
        return f"{len(bad)} of {count} weights hold NaN or infinity, `{self.frame.entries[bad[0]].label}` first"

    def _own_weights(self, call: int, first: int) -> list[str]:
        """Weights and buffers of a module that are not finite: of those inside it too, which it may use as functions.

        Of the step itself only what belongs to no module.
        """
        name = self.frame.calls[call].name
        prefix = f"{name}." if name and name != STEP else ""
        return [
            entry.label
            for i, entry in enumerate(self.frame.entries[:first])
            if entry.role in (WEIGHT, BUFFER)
            and (isnan(self.now.sizes[i]) or (entry.role == WEIGHT and self.now.sizes[i] == inf))
            and (entry.label.startswith(prefix) if prefix else "." not in entry.label)
        ]

    def _operands(self, call: int, first: int) -> tuple[float, int, float]:
        """Largest number that went into what a call made, how many may have been summed up, and its largest weight."""
        size, terms = 0.0, 1
        own = self.frame.entries[first].operands
        for i, entry in enumerate(self.frame.entries[:first]):
            mine = call in entry.consumers or any(self.frame.calls[c].parent == call for c in entry.producers)
            if (i in own if own else entry.role in (INPUT, OUTPUT) and mine) and isfinite(self.now.sizes[i]):
                size, terms = max(size, self.now.sizes[i]), max(terms, entry.terms)
        name = self.frame.calls[call].name
        weights = [
            self.now.sizes[i]
            for i, entry in enumerate(self.frame.entries[:first])
            if entry.role == WEIGHT and name and entry.label.startswith(f"{name}.") and isfinite(self.now.sizes[i])
        ]
        return size, terms, max(weights, default=0.0)

    def _made(self, first: int, origin: Origin) -> Origin:
        """The origin with its table: what was passed on up to the first that is not finite."""
        backward = self.frame.entries[first].role in (GRADIENT, WEIGHT_GRADIENT)
        roles = (GRADIENT, WEIGHT_GRADIENT) if backward else PASSED_ON
        shown = [i for i, entry in enumerate(self.frame.entries[: first + 1]) if entry.role in roles][-ROWS:]
        origin.steps = self.steps
        origin.rows = [self.row(i, f"{origin.cause.words}: `{origin.layer}`" if i == first else "") for i in shown]
        return origin

    def row(self, i: int, verdict: str = "") -> Row:
        """The line of an entry."""
        entry, key = self.frame.entries[i], self.frame.key(i)
        values = [of.sizes[of.by_key[key]] if key in of.by_key else nan for of in self.earlier] + [self.now.sizes[i]]
        latest = next((value for value in reversed(values) if isfinite(value)), nan)
        if entry.call < 0:
            call, name, kind, what = -1, entry.label, "", entry.role
        else:
            of = self.frame.calls[entry.call]
            call, name, kind = of.done, self._name(entry.call), of.kind
            what = "batch" if entry.call == 0 and entry.role == INPUT else f"{entry.role} {entry.label}"
        return Row(
            call, name, kind, what, values, _short(entry.dtype), bits_of_headroom(latest, _limit(entry)), verdict
        )

    def _index(self, call: int) -> int:
        """How many calls had ended before a call, as far as the frame goes."""
        done = self.frame.calls[call].done
        return done if done >= 0 else sum(other.done >= 0 for other in self.frame.calls)

    def _name(self, call: int) -> str:
        of = self.frame.calls[max(call, 0)]
        return of.name or of.kind

    def _is_inside(self, call: int, around: int) -> bool:
        while call > 0:
            call = self.frame.calls[call].parent
            if call == around:
                return True
        return False


def weights_in_words(now: Reading) -> str:
    """How many weights are not finite, and the first of them; empty if all are."""
    bad = [i for i, e in enumerate(now.frame.entries) if e.role == WEIGHT and not isfinite(now.sizes[i])]
    return _Search(now, ()).told(bad) if bad else ""


def _limit(entry: Entry) -> float:
    return float(torch.finfo(entry.dtype).max)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
