"""Parameter change per module, from epoch to epoch and from task to task: which modules forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, isfinite, nan
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.continual.continual_metrics import MEASURES
from lightning_collapse.callbacks.continual.monitored_curves import require_available
from lightning_collapse.callbacks.continual.step_offset import StepsAcrossTasks
from lightning_collapse.monitoring.parameter_snapshot import ParameterSnapshot, mean_changes
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.modules import clean_name, find_modules
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import refuse_flattened

Kind = Literal["epoch_change", "task_change"]


class ForgettingMonitor(StepsAcrossTasks):
    r"""Log how far every module has moved, from epoch to epoch and from task to task: the few that forget move most.

    .. math:: d_\ell = \frac{1}{|\theta_\ell|} \big\| \theta_\ell - \theta_\ell^{\text{before}} \big\|_1

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``:

    - ``continual/{layer}/epoch_change`` at the end of every training epoch, since the end of the one before;
    - ``continual/{layer}/task_change`` when a task ends, since the end of the one before, of the first task since its
      start.

    A layer is a module that holds parameters itself; its buffers, such as the running statistics of a normalization,
    are a layer ``{layer}.buffers`` of their own, since they move on another scale. The x-axis goes on from task to
    task. One copy of what is watched is kept, and a second one for changes between tasks, which is in the state; for
    changes between epochs only the state in the midst of an epoch holds one.

    Args:
        layers: Names of submodules, or glob patterns of them; all that is inside counts. ``None`` takes every module
            that holds parameters or buffers itself.
        between_tasks: Whether to compare tasks.

    Raises:
        ValueError: If ``layers`` is no list of names; when the fit starts, as ``MisconfigurationException``, on a
            pattern that matches nothing, and for ``strategy="fsdp"``, whose flattened parameters belong to no layer.

    References:
        Zhao et al., *Does continual learning equally forget all parameters?*, ICML 2023.
        https://arxiv.org/abs/2304.04158

    Example::

        monitor = ForgettingMonitor()
        fit_tasks(lambda: Trainer(max_epochs=5, callbacks=[monitor]), model, tasks)
        monitor.select_top(0.2)
    """

    def __init__(self, layers: Sequence[str] | None = None, between_tasks: bool = True) -> None:
        super().__init__()
        check_layers(layers, "every module")
        self.layers = layers
        self.between_tasks = between_tasks
        self.changes: dict[str, dict[str, float]] = {"epoch_change": {}, "task_change": {}}
        """The latest reading of every layer, by kind and layer."""
        self._state_key = self._generate_state_key(layers=layers)  # Lightning asks for it at every hook
        self._groups: dict[str, list[str]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._of_epoch: ParameterSnapshot | None = None
        self._of_task: ParameterSnapshot | None = None
        self._restored: dict[str, Any] = {}
        self._in_epoch = False

    def select_top(self, fraction: float, of: Kind = "task_change") -> list[str]:
        """Layers that moved most at the last reading; see :func:`select_top`."""
        return select_top(self.changes[of], fraction)

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_flattened(trainer, type(self).__name__)
        self._tensors, self._groups = {}, {}
        for layer, name, tensor in self._choose(pl_module):
            self._tensors[name] = tensor
            self._groups.setdefault(layer, []).append(name)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        late = [Point("continual", layer, "task_change", 0, nan).key for layer in self._groups]
        require_available(trainer, late, "a task ends, and so does the fit", type(self).__name__)
        self._of_epoch = ParameterSnapshot(self._tensors, self._restored.get("of_epoch"))
        if self.between_tasks:
            before = self._restored.get("of_task")
            if before is None and self._of_task is not None:  # a callback that goes through all tasks
                before = self._of_task.state_dict()
            self._of_task = ParameterSnapshot(self._tensors, before)
        self._restored = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._in_epoch = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.containment("the change of an epoch"):
            self._measure(trainer, pl_module, self._of_epoch, "epoch_change")
        self._in_epoch = False

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.between_tasks:
            self._measure(trainer, pl_module, self._of_task, "task_change")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._of_epoch = None

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "in_epoch": self._in_epoch}
        state["changes"] = {kind: dict(readings) for kind, readings in self.changes.items()}
        if self._of_task is not None:
            state["of_task"] = self._of_task.state_dict()
        if self._of_epoch is not None and self._in_epoch:  # else the copy is what the checkpoint holds anyway
            state["of_epoch"] = self._of_epoch.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._in_epoch, self.changes = state_dict["in_epoch"], state_dict["changes"]
        self._restored = state_dict

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, snapshot: ParameterSnapshot | None, kind: Kind
    ) -> None:
        if snapshot is None or not self._tensors:
            return
        self.changes[kind] = mean_changes(snapshot, self._tensors, self._groups)
        step = self._steps.step(trainer)
        publish(
            trainer,
            pl_module,
            [
                Point("continual", layer, kind, step, value, flag=Flag.OK if isfinite(value) else Flag.NONFINITE)
                for layer, value in self.changes[kind].items()
            ],
        )

    def _choose(self, pl_module: LightningModule) -> Iterator[tuple[str, str, Tensor]]:
        """Layer, name and tensor of all that is watched."""
        if self.layers is None:
            for name, tensor, suffix in state_of(pl_module):
                owner = clean_name(name).rpartition(".")[0]
                yield _apart(owner or "model") + suffix, name, tensor
            return
        try:
            modules = find_modules(pl_module, self.layers)
        except ValueError as error:
            raise MisconfigurationException(f"`ForgettingMonitor(layers={list(self.layers)!r})`: {error}") from error
        for layer, module in modules.items():
            for name, tensor, suffix in state_of(module):
                yield _apart(layer) + suffix, f"{layer}.{name}", tensor


def select_top(changes: Mapping[str, float], fraction: float) -> list[str]:
    """The names of the largest numbers, the largest first.

    Args:
        changes: Numbers by name.
        fraction: Share of the names to return, above 0 up to 1; rounded up.

    Raises:
        ValueError: If ``fraction`` is out of range.

    Example:
        >>> select_top({"conv": 0.1, "norm": 0.3, "head": 0.2}, 0.5)
        ['norm', 'head']
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}.")
    return sorted(changes, key=changes.__getitem__, reverse=True)[: ceil(fraction * len(changes))]


def _apart(layer: str) -> str:
    """The name of a layer in a curve, whose folder must not have the name of a curve of tasks."""
    return f"{layer}.module" if layer in MEASURES else layer


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Parameters and floating-point buffers by name, and what the names of their layers end in."""
    for name, parameter in module.named_parameters():
        if not nn.parameter.is_lazy(parameter):
            yield name, parameter, ""
    for name, buffer in module.named_buffers():
        if not nn.parameter.is_lazy(buffer) and buffer.is_floating_point():
            yield name, buffer, ".buffers"


def _register() -> None:
    source, grows = "Zhao et al., ICML 2023, arXiv 2304.04158", "largest in the modules that forget"
    for name, reads in (("epoch_change", "weights, one epoch apart"), ("task_change", "weights, one task apart")):
        register_curve("continual", name, reads=reads, range="0 to infinity", collapsed=grows, source=source)


_register()
