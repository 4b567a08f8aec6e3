"""Attention monitors: what those of entropy and of logits share, from the attention calls of a batch to its points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor
from lightning_collapse.monitoring.attention_hooks import Reader
from lightning_collapse.monitoring.attention_window import AttentionWindow, Statistics, check_readers
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.points import Flag, Point


class AttentionMonitor(Monitor):
    """Has a window on attention; a subclass opens it in ``start`` by :meth:`listen`, and says what is read and drawn.

    Args:
        layers: Names or patterns of submodules, ``None`` for every one that is captured, or a mapping from patterns to
            functions that read.
        every_n_steps: As in :class:`~lightning_collapse.callbacks.Monitor`.
        rows: Queries to read of each sequence.
        detail: As in :class:`~lightning_collapse.callbacks.Monitor`.
    """

    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, Reader] | None,
        every_n_steps: int | None,
        rows: int,
        detail: Detail,
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_readers(layers)
        self.layers = layers
        self.rows = rows
        self._attention: AttentionWindow | None = None

    def listen(
        self,
        pl_module: LightningModule,
        statistics: Statistics,
        whole: Callable[[str, AttentionCall], None] | None = None,
    ) -> AttentionWindow:
        """Open the window.

        Raises:
            MisconfigurationException: If a pattern matches nothing.
        """
        try:
            window = AttentionWindow(pl_module, self.layers, statistics, self.warn_once, self.rows, whole)
        except ValueError as error:
            call = f"`{type(self).__name__}(layers={list(self.layers or ())!r})`"
            raise MisconfigurationException(f"{call}: {error}") from error
        self._attention = window
        return window

    @override
    def state(self) -> dict[str, Any]:
        return {"heads": {} if self._attention is None else self._attention.state_dict()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if self._attention is not None:
            self._attention.load_state_dict(state["heads"])

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [] if self._attention is None else self._attention.listeners

    @override
    def stop(self) -> None:
        if self._attention is not None:
            self._attention.close()
        self._attention = None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._attention is not None:
            self._attention.before_batch(batch, batches_left == 0)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._attention is not None:
            self._attention.after_batch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._attention is not None:
            self._attention.warn_of_the_silent()

    def say_if_not_called(self, point: Point) -> None:
        """Say once of a layer that nothing of it was captured, if its point has that flag."""
        if point.flag == Flag.NOT_CALLED:
            self.warn_of_layer(
                point.layer, "the attention of {} was not captured before every point; the curves read NaN there."
            )
