"""Constraint, the base class: acts on weights right after each optimizer step that has moved them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.trainer import without_module


class Constraint(Callback):
    """Does something to chosen weights after each step of the optimizer that holds them.

    A subclass writes :meth:`choose` and :meth:`apply`. It is called once per optimizer step: not per micro-batch, not
    for an update that a gradient scaler leaves out, and, of several optimizers, for the weights of the one that
    stepped; with automatic and manual optimization, DDP, ``torch.compile`` and FSDP2. An optimizer that keeps weights
    of its own (a schedule-free one) brings back what is changed here.

    Attributes:
        consequence: What the user loses if :meth:`apply` fails, in words.

    Raises:
        MisconfigurationException: When the fit starts, if the strategy is ``"fsdp"`` or DeepSpeed, which keep weights
            in pieces of their own, or if :meth:`choose` finds nothing.

    Example:
        >>> class Halve(Constraint):
        ...     def choose(self, pl_module):
        ...         return {"head.weight": pl_module.head.weight}
        ...     def apply(self, name, weight):
        ...         weight.mul_(0.5)
    """

    consequence: ClassVar[str] = "weights are left as they are from now on"

    def __init__(self) -> None:
        super().__init__()
        self.contained = Containment(type(self).__name__)
        self._weights: dict[str, Tensor] = {}
        self._removers: list[Callable[[], None]] = []

    @abstractmethod
    def choose(self, pl_module: LightningModule) -> Mapping[str, Tensor]:
        """The parameters to act on by name, when the fit starts; raises if there are none."""

    @abstractmethod
    def apply(self, name: str, weight: Tensor) -> None:
        """Act on one that has moved, without graph; sharded with FSDP2 it is a ``DTensor``, on every process."""

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        """See those that an optimizer is about to move; asked for only where a subclass writes it."""

    def apply_all(self, weights: Mapping[str, Tensor]) -> None:
        """Act on all that one optimizer step has moved; one after another by default."""
        for name, weight in weights.items():
            self.apply(name, weight)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.contained = Containment(type(self).__name__)
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise MisconfigurationException(
                f"`{type(self).__name__}` works on whole weights, and {type(trainer.strategy).__name__} keeps them in"
                " pieces of its own. Train with `strategy='ddp'`, or FSDP2 (`ModelParallelStrategy`)."
            )
        # the parameters that optimizers hold: FSDP2 puts gathered ones in their place for a while
        self._weights = dict(self.choose(pl_module))
        for optimizer in trainer.optimizers:
            hooks = [optimizer.register_step_post_hook(lambda stepped, *_: self._run(self.apply_all, stepped))]
            if type(self).prepare is not Constraint.prepare:
                hooks.append(optimizer.register_step_pre_hook(lambda stepped, *_: self._run(self.prepare, stepped)))
            self._removers += [hook.remove for hook in hooks]

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step may step the optimizer
    @torch.no_grad()
    def _run(self, act: Callable[[Mapping[str, Tensor]], None], optimizer: Optimizer) -> None:
        """Act on what this optimizer steps. Collective where weights are sharded."""
        with self.contained("acting on weights", self.consequence, self._stop):
            held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
            act({name: weight for name, weight in self._weights.items() if id(weight) in held})

    def _stop(self) -> None:
        for remove in self._removers:
            remove()
        self._removers, self._weights = [], {}

    def __getstate__(self) -> dict[str, Any]:
        return {**without_module(self), "_removers": [], "_weights": {}}  # of a copy: neither hooks nor the model
