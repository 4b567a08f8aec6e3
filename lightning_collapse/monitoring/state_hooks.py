"""State hooks: what recurrent and state-space layers hold in memory, seen in the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring.recurrent_states import (
    CellReader,
    RecurrentReader,
    StateReader,
    Trajectory,
    places,
    some,
)
from lightning_collapse.monitoring.router_hooks import CallHook
from lightning_collapse.monitoring.selective_states import Mamba2Reader, MambaReader, RwkvReader
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import Tap, curve_name, hooks_ignored, is_to_be_ignored

Reader = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""From a module, the arguments of its call and what it returned to states ``(N, L, F)``, or of heads
``(N, L, H, F)`` or ``(N, L, H, R, F)``."""
_CALLS = 4


class ToldReader(StateReader):
    """Reads by a function of the user's, whose states are taken for those of twice the training length."""

    def __init__(self, name: str, module: nn.Module, read: Reader) -> None:
        self.names, self.hooked, self._read = [name], [module], read

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """What the function returns."""
        with hooks_ignored():
            states = self._read(module, args, value)
        if not isinstance(states, Tensor) or not 3 <= states.ndim <= 5 or states.shape[1] < 2:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise TypeError(f"`read` must return states (N, L, F), (N, L, H, F) or (N, L, H, R, F), L > 1, got {shape}")
        wide = states.unsqueeze(2) if states.ndim == 3 else states
        wide = some(wide.unsqueeze(3) if wide.ndim == 4 else wide)
        length = states.shape[1] // 2
        seen = torch.stack([wide[:, place - 1] for place in places(length)], dim=1)
        return {self.names[0]: Trajectory(seen, seen.new_zeros(len(seen), 0), length)}


def find_readers(root: nn.Module, taps: Sequence[Tap] | None = None, read: Reader | None = None) -> list[StateReader]:
    """Readers of the recurrent and state-space layers of a model, or of those in the modules that taps name.

    Example:
        >>> [reader.names for reader in find_readers(nn.Sequential(nn.GRU(4, 8, num_layers=2), nn.Linear(8, 1)))]
        [['0.l0', '0.l1']]
    """
    if read is not None:
        return [ToldReader(curve_name(tap.name), tap.module, read) for tap in taps or ()]
    roots = [("", root)] if taps is None else [(tap.name, tap.module) for tap in taps]
    found: dict[int, StateReader] = {}
    for prefix, part in roots:
        for name, module in part.named_modules(prefix=prefix):
            if id(module) not in found and (reader := _reader_of(curve_name(name or "model"), module)) is not None:
                found[id(module)] = reader
    return list(found.values())


class StateHooks(HookOwner):
    """Reads states while ``armed``, and costs one ``if`` while not; nothing waits for the device.

    Args:
        readers: What reads them.
        containment: Where failures are told.

    Attributes:
        armed: Whether to read now.
        readers: By the names of their curves.

    Example:
        >>> gru = nn.GRU(4, 8, batch_first=True)
        >>> hooks = StateHooks(find_readers(gru), Containment("example"))
        >>> hooks.armed = True
        >>> _ = gru(torch.randn(2, 12, 4))
        >>> hooks.armed = False
        >>> {name: seen.states.shape for name, seen in hooks.pop().items()}  # at 3, 6, 12 and 24 tokens
        {'model': torch.Size([2, 4, 1, 1, 8])}
        >>> hooks.remove()
    """

    def __init__(self, readers: Sequence[StateReader], containment: Containment) -> None:
        self.readers = {name: reader for reader in readers for name in reader.names}
        self._contained, self._armed = containment, False
        self._found: dict[str, list[Trajectory]] = {}
        self._hooks: list[ModuleHook] = []
        for reader in readers:
            with containment(f"a hook on `{reader.names[0]}`"):
                self._hooks += [CallHook(self, reader, module) for module in reader.hooked]

    @property
    def armed(self) -> bool:
        """Whether to read now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        if self._armed and not armed:
            for reader in dict.fromkeys(self.readers.values()):
                self._add(reader, reader.finish)
        self._armed = armed

    def pop(self) -> dict[str, Trajectory]:
        """Hand over what was seen since the last time, the calls of a layer joined."""
        found, self._found = self._found, {}
        joined = {}
        for name, calls in found.items():
            alike = [call for call in calls if call.states.shape[1:] == calls[0].states.shape[1:]]
            states, means = torch.cat([call.states for call in alike]), torch.cat([call.means for call in alike])
            joined[name] = Trajectory(states, means, max(call.length for call in alike))
        return joined

    def has_failed(self, name: str) -> bool:
        """Whether a warning has told already why nothing comes from a reader."""
        return _place(self.readers[name]) in self._contained.failed

    def capture(self, key: StateReader, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        """Read a call; for hooks."""
        if self._armed and not is_to_be_ignored():
            self._add(key, lambda: key.take(module, args, value))

    def _add(self, reader: StateReader, take: Callable[[], dict[str, Trajectory]]) -> None:
        with self._contained(_place(reader), "what fails is left out"), torch.no_grad():
            for name, seen in take().items():
                calls = self._found.setdefault(name, [])
                if len(calls) < _CALLS:
                    calls.append(seen)


def _place(reader: StateReader) -> str:
    return f"reading the states of `{reader.names[0]}`"


def _reader_of(name: str, module: Any) -> StateReader | None:
    """By class, or by the parts that a mixer has."""
    if isinstance(module, nn.RNNBase) and hasattr(module, "mode"):
        return RecurrentReader(name, module)
    if isinstance(module, nn.RNNCell | nn.LSTMCell | nn.GRUCell):
        return CellReader(name, module)
    rates, decay = getattr(module, "A_log", None), getattr(module, "time_decay", None)
    if isinstance(rates, Tensor) and rates.ndim == 2 and hasattr(module, "x_proj") and hasattr(module, "dt_proj"):
        return MambaReader(name, module)
    if (
        isinstance(rates, Tensor)
        and rates.ndim == 1
        and all(hasattr(module, k) for k in ("in_proj", "conv1d", "dt_bias"))
    ):
        return Mamba2Reader(name, module)
    if isinstance(decay, Tensor) and decay.ndim == 1 and hasattr(module, "key") and hasattr(module, "value"):
        return RwkvReader(name, module)
    return None
