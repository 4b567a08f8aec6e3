"""Monitored curves: what early stopping, checkpoints and schedulers wait for, and whether it can come."""

from __future__ import annotations

from collections.abc import Collection

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


def require_available(trainer: Trainer, late: Collection[str], when: str, who: str) -> None:
    """Refuse a callback or a scheduler that waits for a curve before it begins; Lightning would end the fit then.

    Args:
        trainer: Whose callbacks; curves that ``callback_metrics`` holds have begun.
        late: Curves that begin late.
        when: Where they do, in words that follow "when".
        who: Who publishes them.

    Raises:
        MisconfigurationException: If anything waits for one of them, and is strict about it.
    """
    watchers = [*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks]
    waiting = {
        type(watcher).__name__: monitor
        for watcher in watchers
        if isinstance(monitor := getattr(watcher, "monitor", None), str) and getattr(watcher, "strict", True)
    }
    waiting |= {
        type(config.scheduler).__name__: config.monitor
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau and config.monitor is not None and config.strict
    }
    for watcher, monitor in waiting.items():
        if monitor in late and monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"`{watcher}(monitor={monitor!r})` waits for a curve of `{who}` that begins when {when}. Choose one"
                " that is there from the first epoch on, such as a metric that the module logs itself, or, for"
                " `EarlyStopping`, set `strict=False`."
            )
