"""State monitor: whether the memory of recurrent and state-space layers lasts, grows without end, or dies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.hooked_monitor import HookedMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.states import (
    eigenmodes,
    forgetting_horizon,
    head_growth,
    memory_share,
    state_statistics,
    time_constants,
    token_divergence,
    transient_growth,
)
from lightning_collapse.functional.states.eigenmodes import UNRELIABLE
from lightning_collapse.monitoring.recurrent_states import Trajectory
from lightning_collapse.monitoring.state_hooks import Reader, StateHooks, find_readers
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.monitoring.to_host import copies_on_host
from lightning_collapse.utilities.arguments import check_layers, check_reader, require_whole
from lightning_collapse.utilities.distributed import all_gather_rows, from_all_processes, world_size
from lightning_collapse.utilities.modules import let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

_CHEN, _GU = "Chen et al. 2024, arXiv 2410.07145", "Gu et al. 2020, arXiv 2008.07669"
_LONGEST, _POWERS = 1000.0, (1, 4, 16)
_POINT_AT = (
    'Name its modules and say what they hold: `StateMonitor(layers=["blocks.*.mixer"], read=...)`, a function'
    " `read(module, args, output)` that returns states `(N, L, F)`, or of heads `(N, L, H, F)`."
)


class StateMonitor(HookedMonitor[StateHooks]):
    """Log how the states of recurrent and state-space layers grow with the sequence, and how long they last.

    **Logged metrics**, ``state/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    States are read of up to 8 sequences of the training step: at a quarter of their length ``T``, at ``T``, and at
    ``2 T``, where the layer has read the same once more, so that failure beyond the training length shows before
    anyone has longer text. Moments are of each head, and never averaged over heads, since a few of them fail. Lengths
    of memory are in units of ``T``, and 1,000 stands for all above.

    Found are ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells (every layer and direction; the one head is the state,
    of an LSTM its cell's; memory by the Jacobian at the mean input and state), and the mixers of Mamba, Jamba (a head
    is a channel), Mamba-2 and RWKV-4. Fused kernels that never call ``x_proj``, and padding that is not packed, are not
    seen through: use ``read``. Others are told what to read; what it returns counts as ``2 T`` long::

        def read(mixer, args, output):
            return mixer.states  # (N, L, H, F)

        Trainer(callbacks=[StateMonitor(layers=["blocks.*.mixer"], read=read)])

    Args:
        layers: Names of modules, or glob patterns of them; what is recurrent inside counts. ``None`` takes all.
        read: Called with a module of ``layers``, the arguments of its call and what it returned, without gradient;
            returns states ``(N, L, F)``, or of heads ``(N, L, H, F)`` or ``(N, L, H, R, F)``. It must not draw random
            numbers.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        modes_every: Points between two that decompose transitions: curves of memory, conditioning and growth.
        max_dim: States wider than this are not decomposed.
        detail: ``"low"`` keeps ``n`` and ``flag`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range, or ``read`` without ``layers``; when the fit starts, as
            ``MisconfigurationException``, on a pattern that matches nothing.

    References:
        Chen et al., *Stuffed Mamba*, 2024, https://arxiv.org/abs/2410.07145; Vo et al., *Demystifying the Token
        Dynamics of Deep Selective State Space Models*, 2025, https://arxiv.org/abs/2410.03292.

    Example::

        trainer = Trainer(callbacks=[StateMonitor(), CollapseGuard()])
    """

    family = "state"
    declares = (
        Curve("growth", "log ratio of variance at 2 T to T, largest head", "any number", "above 1.4: no end", _CHEN),
        Curve("decay", "the same of the smallest head", "any number", "far below 0", _CHEN),
        Curve("rms", "root mean square at T, largest head", "0 to infinity", "growing", _CHEN),
        Curve("smallest_rms", "root mean square at T, smallest head", "0 to infinity", "near 0", _CHEN),
        Curve("early_rms", "root mean square at T / 4, largest head", "0 to infinity", "far below `rms`", _CHEN),
        Curve("beyond_rms", "root mean square at 2 T, largest head", "0 to infinity", "far above `rms`", _CHEN),
        Curve("early_rank", "effective rank at T / 4, smallest head", "0 to n", "near 1", "Roy & Vetterli 2007"),
        Curve("effective_rank", "effective rank at T, smallest head", "0 to n", "near 1", "Roy & Vetterli 2007"),
        Curve("beyond_rank", "effective rank at 2 T, smallest head", "0 to n", "near 1", "Roy & Vetterli 2007"),
        Curve("memory_median", "time constant of the median mode over T", "0 to 1000", "near 0: forgets"),
        Curve("memory_longest", "time constant of the slowest mode over T", "0 to 1000", "1000: never forgets"),
        Curve("memory_beyond", "share of modes slower than T", "0 to 1", "near 1", _CHEN),
        Curve("horizon", "steps that leave at most 1 %, over T", "0 to 1000", "far above 1"),
        Curve("spectral_radius", "largest modulus of the transition", "0 to infinity", "above 1"),
        Curve("conditioning", "of the transition's eigenvectors", "1 to 1e16", "large: the radius misleads", _GU),
        *(Curve(f"transient_{k}", f"norm of {k} transitions", "0 to infinity", "above 1") for k in _POWERS),
        Curve(
            "token_divergence",
            "largest real part over modulus of the eigenvalues of S_C' S_B",
            "-1 to 1",
            "below 0: tokens converge",
            "Vo et al. 2025, arXiv 2410.03292",
        ),
        Curve("n", "sequences behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "states", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        read: Reader | None = None,
        every_n_steps: int | None = None,
        modes_every: int = 10,
        max_dim: int = 512,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all recurrent layers")
        check_reader(read, layers)
        require_whole(1, modes_every=modes_every, max_dim=max_dim)
        self.layers, self.reader, self.modes_every, self.max_dim = layers, read, modes_every, max_dim
        self._turn = 0

    @override
    def state(self) -> dict[str, Any]:
        return {"turn": self._turn}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._turn = state["turn"]

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        let_hooks_be_seen(pl_module)
        self._turn = 0
        taps = None if self.layers is None else self.choose_taps(self.layers, [], pl_module)
        readers = find_readers(pl_module, taps, self.reader)
        if not readers:
            where = "the model" if self.layers is None else f"what `layers={list(self.layers)!r}` names"
            self.warn_once(f"{where} has no recurrent layer that is known. {_POINT_AT}")
        self._hooks = StateHooks(readers, self.contained)
        self._scope = StepScope(pl_module)

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._hooks is not None and self._scope is not None and batches_left < trainer.accumulate_grad_batches:
            if batches_left == trainer.accumulate_grad_batches - 1:
                self._hooks.pop()
            self._scope.request(self._hooks)

    @override
    @torch.no_grad()
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Statistics of the states of all processes, and at times the modes of transitions. Collective."""
        if self._hooks is None:
            return {}
        found, readings = self._hooks.pop(), dict[Name, Tensor]()
        shapes = {name: (seen.states.shape[1:], seen.means.shape[1], seen.length) for name, seen in found.items()}
        for others in from_all_processes(shapes) if world_size() > 1 else ():
            shapes = {**others, **shapes, **{k: max(shapes[k], v) for k, v in others.items() if k in shapes}}
        means: dict[str, Tensor] = {}
        for name in sorted(shapes):
            of_states, mean = self._of_states(found.get(name), *shapes[name][:2], pl_module.device)
            readings |= {(name, key): value for key, value in of_states.items()}
            means[name] = mean
        if self._turn % self.modes_every == 0:
            readings |= self._of_modes(means, {name: shape[2] for name, shape in shapes.items()})
        self._turn += 1
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        points: list[Point] = []
        if self._hooks is None:
            return points
        names = {name for name, _ in numbers}
        for name in self._hooks.readers:
            found = {key: value for (of, key), value in numbers.items() if of == name}
            n, seen = int(found.pop("n", 0)), found.pop("seen", 0)
            flag = Flag.NOT_CALLED if not seen else Flag.NONFINITE if n < seen else Flag.OK
            if name not in names:
                if not self._hooks.has_failed(name):
                    self.warn_of_layer(name, f"{{}} did not run before every point. {_POINT_AT}")
                continue
            if found.get("conditioning", 0.0) > UNRELIABLE:
                flag = max(flag, Flag.UNCONVERGED)
            found |= {"n": float(n), "flag": float(flag)}
            points += [Point(self.family, name, key, step, value, n, nan, flag) for key, value in found.items()]
        return points

    def _of_states(
        self, seen: Trajectory | None, shape: Sequence[int], width: int, device: torch.device
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Readings of states of this shape, and the mean of what transitions are read at."""
        size = torch.Size(shape).numel()
        fits = seen is not None and seen.states.shape[1:] == torch.Size(shape) and seen.means.shape[1] == width
        own = (
            torch.cat([seen.states.flatten(1), seen.means], dim=1)
            if fits and seen is not None
            else torch.zeros(0, size + width)
        )
        rows, counted = all_gather_rows(own.to(device, torch.float32))
        states, means = rows[:, :size].reshape(-1, *shape), rows[:, size:]
        kept = counted & states[:, 0].flatten(1).isfinite().all(dim=1) & means.isfinite().all(dim=1)
        found = state_statistics(states, kept)
        change = head_growth(found.variance[2], found.variance[3])
        largest, least = found.rms.amax(dim=1), found.effective_rank.amin(dim=1)
        mean = means.where(kept.unsqueeze(1), 0.0).sum(dim=0) / kept.sum()
        return {
            "growth": change.amax(),
            "decay": change.amin(),
            "rms": largest[2],
            "smallest_rms": found.rms[2].amin(),
            "early_rms": largest[0],
            "beyond_rms": largest[3],
            "early_rank": least[0],
            "effective_rank": least[2],
            "beyond_rank": least[3],
            "n": kept.sum(),
            "seen": counted.sum(),
        }, mean

    def _of_modes(self, means: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[Name, Tensor]:
        """How long states last. Collective where weights are sharded; waits for the device."""
        assert self._hooks is not None
        readings: dict[Name, Tensor] = {}
        matrices: dict[str, Tensor] = {}
        constants: dict[str, tuple[Tensor, Tensor]] = {}
        for name in sorted(means):
            reader = self._hooks.readers[name]
            if (pair := reader.projections()) is not None:
                readings[name, "token_divergence"] = token_divergence(*pair)
            modes = reader.modes(name, means[name])
            if modes.matrix is not None and len(modes.matrix) <= self.max_dim:
                matrices[name] = modes.matrix
            elif modes.rates is not None:
                constants[name] = time_constants(modes.rates, "continuous"), torch.ones(())
        # on the host, where small matrices that are not symmetric are decomposed fastest
        for name, matrix in zip(matrices, copies_on_host(list(matrices.values())), strict=True):
            values, conditioning = eigenmodes(matrix)
            constants[name] = time_constants(values), conditioning
            readings[name, "spectral_radius"] = values.abs().amax()
            readings[name, "conditioning"] = conditioning.clamp_max(1e16)
            for k, growth in zip(_POWERS, transient_growth(matrix, _POWERS), strict=True):
                readings[name, f"transient_{k}"] = growth
        for name, (steps, conditioning) in constants.items():
            over = (steps / lengths[name]).clamp_max(_LONGEST)
            readings[name, "memory_median"], readings[name, "memory_longest"] = (
                over.sort().values[len(over) // 2],
                over.amax(),
            )
            readings[name, "memory_beyond"] = memory_share(steps, lengths[name])
            horizon = forgetting_horizon(steps, conditioning) / lengths[name]
            readings[name, "horizon"] = horizon.clamp_max(_LONGEST)
        return readings
