"""Layer monitors: what those share that add up all numbers of some layers in the step that ends in a point."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor
from lightning_collapse.monitoring.execution_order import ExecutionOrder
from lightning_collapse.monitoring.moment_hooks import MomentHooks
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.execution import Execution
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import Tap, default_taps, let_hooks_be_seen

H = TypeVar("H", bound=MomentHooks[Any])


class LayerMonitor(Monitor, Generic[H]):
    """Hooks the chosen layers, or default ones in the order of the first step; a subclass makes the hooks.

    Args:
        layers: Names of submodules, or glob patterns of them; ``None`` for :meth:`default_layers`.
        every_n_steps: As in :class:`~lightning_collapse.callbacks.Monitor`.
        detail: As in :class:`~lightning_collapse.callbacks.Monitor`.
    """

    identity = ("layers", "every_n_steps")

    def __init__(self, layers: Sequence[str] | None, every_n_steps: int | None, detail: Detail) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        self.layers = layers
        self._forget()

    @abstractmethod
    def make_hooks(self, taps: Sequence[Tap]) -> H:
        """Hooks on these taps."""

    def default_layers(self, root: nn.Module, order: Execution | None = None) -> list[Tap]:
        """What is watched without any names."""
        return default_taps(root, order)

    def _forget(self) -> None:
        self._taps: list[Tap] = []
        self._next: list[Tap] = []
        self._hooks: H | None = None
        self._order: ExecutionOrder | None = None
        self._scope: StepScope | None = None

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._next = self.choose_taps(self.layers, self.default_layers(pl_module), pl_module)
        let_hooks_be_seen(pl_module)
        self._scope = StepScope(pl_module)
        if self.layers is None:
            self._order = ExecutionOrder(pl_module, type(self).__name__)
        self._follow()

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [owner for owner in (self._hooks, self._order) if owner is not None]

    @override
    def stop(self) -> None:
        for owner in (self._hooks, self._order, self._scope):
            if owner is not None:
                owner.remove()
        self._forget()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._follow()
        step = trainer.accumulate_grad_batches
        if self._hooks is None or self._scope is None or (batches_left >= step and self._order is None):
            return
        if batches_left >= step - 1:
            self._hooks.begin()
        self._hooks.mask = padding_mask(batch)
        self._scope.request(*(owner for owner in (self._hooks, self._order) if owner is not None))

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        order, self._order = self._order, None
        if order is not None and (execution := order.pop()) is not None:
            self._next = self.default_layers(pl_module, execution)

    def _follow(self) -> None:
        """Listen where the order of the first batch says, from the batch after it on."""
        if self._next != self._taps:
            if self._hooks is not None:
                self._hooks.remove()
            self._taps = self._next
            self._hooks = self.make_hooks(self._taps)
