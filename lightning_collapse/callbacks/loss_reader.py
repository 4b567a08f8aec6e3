"""Loss reader: reads once, before the first backward pass of a fit, what the loss compares."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_collapse.monitoring import CallRecord, StepScope, read_loss
from lightning_collapse.monitoring.loss_use import LossUse
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import from_first_process
from lightning_collapse.utilities.modules import is_compiled

BATCHES = 4
"""Batches without a backward pass before it gives up."""


_READERS: WeakKeyDictionary[LightningModule, LossReader] = WeakKeyDictionary()


def reader_of(pl_module: LightningModule, containment: Containment) -> LossReader:
    """The reader of a module's next first loss, one for all callbacks of a fit."""
    reader = _READERS.get(pl_module)
    if reader is None or not reader.waits:
        _READERS[pl_module] = reader = LossReader(pl_module, containment)
    return reader


class LossReader:
    """Listens to training steps until the first backward pass, and keeps nothing behind it.

    Args:
        pl_module: The module that is trained.
        containment: Of its owner.

    Attributes:
        use: What the loss of the first process uses; ``None`` while nothing was read.
    """

    def __init__(self, pl_module: LightningModule, containment: Containment) -> None:
        self.use: LossUse | None = None
        self._module: LightningModule | None = pl_module
        self._contained = containment
        self._record: CallRecord | None = None
        self._scope: StepScope | None = None
        self._batch: Any = None
        self._left = BATCHES

    @property
    def waits(self) -> bool:
        """Whether a loss is still to come."""
        return self._left > 0

    def before_batch(self, batch: Any) -> None:
        """Listen to the step of this batch; every one who waits may say so."""
        if not self.waits or self._module is None or self._batch is not None:
            return
        if self._record is None:
            self._record = CallRecord(self._module, self._contained.owner)
            # what is compiled is not listened to, and its step stays as it is
            self._scope = None if is_compiled(self._module) else StepScope(self._module)
        self._record.forget()
        self._batch = (batch,)
        if self._scope is not None:
            self._scope.request(self._record)

    def before_backward(self, loss: Tensor) -> None:
        """Read the first loss. Collective at the first call."""
        if self._batch is None or self._record is None:
            return
        use = LossUse(why="it could not be read")
        with self._contained("reading the loss", "what it compares stays unknown"):
            use = read_loss(loss, self._batch[0], self._record)
        self.remove()
        self.use = from_first_process(use)

    def after_batch(self) -> None:
        """Forget a batch that had no backward pass."""
        if self._batch is None or self._record is None:
            return
        self._record.forget()
        self._batch = None
        self._left -= 1
        if not self.waits:
            self.remove()

    def remove(self) -> None:
        """Stop listening and forget everything but the result; may be called twice."""
        self._left, self._batch = 0, None
        if self._record is not None:
            self._record.clear()
        if self._scope is not None:
            self._scope.remove()
        self._record = self._scope = self._module = None
