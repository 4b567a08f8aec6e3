"""Recurrent states of torch's own layers: run again from what they read, through the training length and beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_collapse.functional.states import transition_matrix
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.weight_matrices import whole

SEQUENCES = 8
"""Sequences of a call that are read, at most; fewer of large ones, but two."""
_NUMBERS = 1 << 22


class Trajectory(NamedTuple):
    """States of some sequences at a quarter, a half, all and twice of the training length.

    Attributes:
        states: Shape ``(K, 4, H, R, F)``.
        means: What :meth:`StateReader.modes` is read at, ``(K, E)``.
        length: The training length.
    """

    states: Tensor
    means: Tensor
    length: int


class Modes(NamedTuple):
    """Rates of decay of modes in continuous time, or the matrix that takes a state to the next, or neither."""

    rates: Tensor | None = None
    matrix: Tensor | None = None


class StateReader:
    """Reads the states of one module while it runs.

    Attributes:
        names: Of its curves, one for each state it has.
        hooked: The modules to be called for.
    """

    names: Sequence[str]
    hooked: Sequence[nn.Module]

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """The trajectories that a call of one of ``hooked`` completes."""
        raise NotImplementedError

    def finish(self) -> dict[str, Trajectory]:
        """Those that the end of the step completes."""
        return {}

    def modes(self, name: str, means: Tensor) -> Modes:
        """How a state fades, at the mean of ``means``. Collective where weights are sharded."""
        return Modes()

    def projections(self) -> tuple[Tensor, Tensor] | None:
        """Weights that make ``C`` and ``B`` of a token, of a selective state space. Collective likewise."""
        return None


def places(length: int) -> list[int]:
    """After how many tokens states are read."""
    return [max(length // 4, 1), max(length // 2, 1), length, 2 * length]


def some(rows: Tensor, numbers: int = 0) -> Tensor:
    """Some sequences ``(K, ...)`` in at least ``float32``; ``numbers`` of each are what its states come to."""
    limit = _NUMBERS // max(rows[:1].numel(), numbers, 1)
    return precise(evenly(rows.detach(), min(max(limit, 2), SEQUENCES)))


def precise(tensor: Tensor) -> Tensor:
    """All of a weight, in at least ``float32``. Collective if it is sharded."""
    return whole(tensor).to(torch.promote_types(tensor.dtype, torch.float32))


class RecurrentReader(StateReader):
    """Reads an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``: every layer and direction. The state of an LSTM is its cell's.

    Args:
        name: Of the module.
        module: It.
    """

    def __init__(self, name: str, module: nn.RNNBase) -> None:
        self.module, self.hooked = module, [module]
        ends = ["", "_reverse"] if module.bidirectional else [""]
        self._ends = [f"_l{k}{end}" for k in range(module.num_layers) for end in ends]
        self.names = [f"{name}.{end[1:]}" for end in self._ends] if len(self._ends) > 1 else [name]

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """Of every layer and direction; dropout between layers is left out."""
        rows, order = args[0], None
        if isinstance(rows, PackedSequence):  # the longest, cut to the shortest of these: no state is of padding
            order, sorted_ = rows.sorted_indices, rows._replace(unsorted_indices=None)
            padded, lengths = pad_packed_sequence(sorted_, batch_first=True)
            kept = min(SEQUENCES, len(lengths))
            rows = padded[:kept, : int(lengths[kept - 1])]  # lengths are on the host
        elif rows.ndim == 2:
            rows = rows.unsqueeze(0)
        elif not self.module.batch_first:
            rows = rows.transpose(0, 1)
        given = args[1] if len(args) > 1 else None
        starts = [] if given is None else list(given) if isinstance(given, tuple) else [given]
        starts = [start.unsqueeze(1) if start.ndim == 2 else start for start in starts]
        if order is not None:
            starts = [start.index_select(1, order[: len(rows)]) for start in starts]
        rows, found = some(rows), {}
        starts = [precise(evenly(start.detach().transpose(0, 1), len(rows))) for start in starts]
        directions = 2 if self.module.bidirectional else 1
        for first in range(0, len(self._ends), directions):
            outputs = []
            for i in range(first, first + directions):
                turned = rows.flip(1) if i > first else rows
                weights, start = _weights(self.module, self._ends[i]), [start[:, i] for start in starts]
                found[self.names[i]], output = run(self.module.mode, weights, turned, start)
                outputs.append(output.flip(1) if i > first else output)
            rows = torch.cat(outputs, dim=2)
        return found

    def modes(self, name: str, means: Tensor) -> Modes:
        """The Jacobian at the mean input and state."""
        return cell_modes(self.module.mode, _weights(self.module, self._ends[self.names.index(name)]), means)


class CellReader(StateReader):
    """Reads an ``nn.RNNCell``, ``nn.LSTMCell`` or ``nn.GRUCell``: its calls in a step, one after the other.

    A call without a state, or of another number of sequences, begins anew.

    Args:
        name: Of the module.
        module: It.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.module, self.hooked, self.names = module, [module], [name]
        nonlinearity = getattr(module, "nonlinearity", "")
        kinds = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
        self._mode = next(
            (kind for cls, kind in kinds.items() if isinstance(module, cls)), f"RNN_{nonlinearity.upper()}"
        )
        self._inputs: list[Tensor] = []
        self._start: list[Tensor] = []

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """Keep what it reads."""
        rows = some(args[0] if args[0].ndim == 2 else args[0].unsqueeze(0))
        given = args[1] if len(args) > 1 else None
        if given is None or (self._inputs and rows.shape != self._inputs[0].shape):
            self._inputs = []
        if not self._inputs:
            states = [] if given is None else given if isinstance(given, tuple) else [given]
            states = [state.detach() if state.ndim == 2 else state.detach().unsqueeze(0) for state in states]
            self._start = [precise(evenly(state, len(rows))) for state in states]
        self._inputs.append(rows)
        return {}

    def finish(self) -> dict[str, Trajectory]:
        """Run what was kept."""
        inputs, self._inputs = self._inputs, []
        if not inputs:
            return {}
        return {self.names[0]: run(self._mode, _weights(self.module), torch.stack(inputs, dim=1), self._start)[0]}

    def modes(self, name: str, means: Tensor) -> Modes:
        """The Jacobian at the mean input and state."""
        return cell_modes(self._mode, _weights(self.module), means)


def _weights(module: Any, end: str = "") -> list[Tensor]:
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    names += ["weight_hr"] if getattr(module, "proj_size", 0) else []
    return [precise(getattr(module, name + end)) for name in names]


def run(mode: str, weights: list[Tensor], rows: Tensor, start: Sequence[Tensor]) -> tuple[Trajectory, Tensor]:
    """Run one layer over its input ``(K, T, I)`` twice; the output is of the first time, ``(K, T, O)``."""
    call: Any = getattr(torch, mode.lower())
    length, lstm = rows.shape[1], mode == "LSTM"
    projection = len(weights) in (3, 5)
    zeros = rows.new_zeros(1, len(rows), weights[1].shape[1])
    state = [part.unsqueeze(0).to(rows).contiguous() for part in start] or [zeros]
    if lstm and not start:
        state.append(rows.new_zeros(1, len(rows), weights[1].shape[0] // 4))
    at, states, outputs, middle = 0, [], [], state
    # cuDNN warns of weights that do not lie together, as those of one layer, or of half precision made whole, do not
    with torch.backends.cudnn.flags(enabled=False), torch.autocast(rows.device.type, enabled=False):
        for place in places(length):
            if place > at:
                piece = rows[:, at:place] if place <= length else rows
                output, *state = call(
                    piece,
                    tuple(state) if lstm else state[0],
                    weights,
                    len(weights) - projection > 2,
                    1,
                    0.0,
                    False,
                    False,
                    True,
                )
                outputs += [output] if place <= length else []
            middle = state if place <= length else middle
            states.append(state[-1][0])
            at = place
    seen = torch.stack(states, dim=1)[:, :, None, None]
    means = torch.cat([rows.mean(dim=1), *(part[0] for part in middle)], dim=1)
    return Trajectory(seen, means, length), torch.cat(outputs, dim=1)


def cell_modes(mode: Any, weights: list[Tensor], means: Tensor) -> Modes:
    """The Jacobian of a cell with these weights at the mean of its inputs and states, joined."""
    width, projection = weights[0].shape[1], weights.pop() if len(weights) in (3, 5) else None
    parts = [*weights, *([None] * (4 - len(weights))), *([] if projection is None else [projection])]
    return Modes(matrix=transition_matrix(mode, parts, means[:width], means[width:]))
