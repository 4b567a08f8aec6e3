"""Selective states of Mamba, Mamba-2 and RWKV: computed again from what their projections return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear, pad, silu, softplus

from lightning_collapse.functional.states import scan_states
from lightning_collapse.monitoring.recurrent_states import Modes, StateReader, Trajectory, places, precise, some
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.features import evenly


class SelectiveReader(StateReader):
    """What readers of these share.

    Args:
        name: Of the mixer.
        mixer: It, of a class that nobody needs to know: it is read by the names of its parts.
    """

    def __init__(self, name: str, mixer: Any) -> None:
        self.names, self.mixer = [name], mixer

    def modes(self, name: str, means: Tensor) -> Modes:
        """Rates at the mean step size."""
        return Modes(rates=(means.unsqueeze(1) * self._rates().flatten(1)).flatten())

    def _rates(self) -> Tensor:
        rates = -precise(self.mixer.A_log).exp()
        return rates if rates.ndim == 2 else rates.unsqueeze(1)

    def _scan(self, steps: Tensor, inputs: Tensor, keys: Tensor) -> dict[str, Trajectory]:
        length = steps.shape[1]
        states = scan_states(steps, self._rates(), steps.unsqueeze(3) * inputs, keys, places(length))
        return {self.names[0]: Trajectory(states, steps.mean(dim=1), length)}


class MambaReader(SelectiveReader):
    """Reads a mixer of Mamba or Jamba by ``x_proj``, ``dt_proj`` and ``A_log``; a head is a channel."""

    def __init__(self, name: str, mixer: Any) -> None:
        super().__init__(name, mixer)
        self.hooked = [mixer.x_proj]

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """Of a call of ``x_proj``."""
        rank, numbers = self._rank, 4 * self.mixer.A_log.numel()
        made = some(value, max(numbers, args[0][:1].numel()))
        inputs = precise(evenly(args[0].detach(), len(made)))
        width = (made.shape[2] - rank) // 2
        parts = dict(zip(("dt", "b", "c"), torch.split(made, [rank, width, width], dim=2), strict=True))
        for key, part in parts.items():  # Jamba's; called so that no hook on them runs
            norm = getattr(self.mixer, f"{key}_layernorm", None)
            parts[key] = part if norm is None else norm.forward(part)
        projection = self.mixer.dt_proj
        bias = None if projection.bias is None else precise(projection.bias)
        steps = softplus(linear(parts["dt"], precise(projection.weight), bias))
        return self._scan(steps, inputs.unsqueeze(3), parts["b"])

    def projections(self) -> tuple[Tensor, Tensor] | None:
        """Rows of ``x_proj``."""
        weight, rank = precise(self.mixer.x_proj.weight), self._rank
        width = (len(weight) - rank) // 2
        return weight[rank + width :], weight[rank : rank + width]

    @property
    def _rank(self) -> int:
        return int(self.mixer.dt_proj.weight.shape[1])


class Mamba2Reader(SelectiveReader):
    """Reads a mixer of Mamba-2 by ``in_proj``, ``conv1d``, ``dt_bias`` and ``A_log``: heads of matrices."""

    def __init__(self, name: str, mixer: Any) -> None:
        super().__init__(name, mixer)
        self.hooked = [mixer.in_proj]
        numbers = (getattr(mixer, key, None) for key in ("ssm_state_size", "d_state", "state_size"))
        self._width = next(int(n) for n in numbers if n)
        groups = (getattr(mixer, key, None) for key in ("n_groups", "ngroups"))
        self._groups = next((int(n) for n in groups if n), 1)

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """Of a call of ``in_proj``; its convolution is done again."""
        weight, heads = precise(self.mixer.conv1d.weight), len(self.mixer.A_log)
        bias = None if self.mixer.conv1d.bias is None else precise(self.mixer.conv1d.bias)
        channels, shared = len(weight), self._groups * self._width
        made = some(value, 4 * (channels - 2 * shared) * self._width)
        read = pad(made[..., -heads - channels : -heads].mT, (weight.shape[2] - 1, 0))
        mixed = silu(conv1d(read, weight, bias, groups=channels)).mT
        x, b, _ = torch.split(mixed, [channels - 2 * shared, shared, shared], dim=2)
        steps = softplus(made[..., -heads:] + precise(self.mixer.dt_bias))
        keys = b.reshape(*b.shape[:2], self._groups, self._width).repeat_interleave(heads // self._groups, dim=2)
        return self._scan(steps, x.reshape(*x.shape[:2], heads, -1), keys)


class RwkvReader(SelectiveReader):
    """Reads the time mixing of RWKV-4 by ``key``, ``value`` and ``time_decay``: a head is a channel's mean so far."""

    def __init__(self, name: str, mixer: Any) -> None:
        super().__init__(name, mixer)
        self.hooked = [mixer.key, mixer.value]
        self._key: Tensor | None = None

    def take(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> dict[str, Trajectory]:
        """Of a call of ``value`` that follows one of ``key``."""
        if module is self.mixer.key:
            self._key = some(value).to(accumulation_dtype(value.device))
        if module is self.mixer.key or self._key is None:
            return {}
        weight, self._key = (self._key - self._key.amax(dim=1, keepdim=True)).exp(), None
        values = some(value).to(weight)
        written = weight.unsqueeze(3) * torch.stack([values, torch.ones_like(values)], dim=3)
        [(name, found)] = self._scan(torch.ones_like(values), written, torch.ones_like(values[..., :1])).items()
        sums, weights = torch.split(found.states, 1, dim=3)
        tiny = torch.finfo(weights.dtype).tiny
        return {name: found._replace(states=(sums / weights.clamp_min(tiny)).float(), means=found.means.float())}

    def finish(self) -> dict[str, Trajectory]:
        """Forget a key without a value."""
        self._key = None
        return {}

    def _rates(self) -> Tensor:
        return -precise(self.mixer.time_decay).exp().flatten().unsqueeze(1)
