"""Built-in actions of the guard: warn, log, checkpoint, stop."""

import os
from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.callbacks.guard.action import Action, checkpoint_folder
from lightning_collapse.reporting import log_data, log_text, verdict_records
from lightning_collapse.rules import Judgement
from lightning_collapse.utilities.console import rank_zero_say
from lightning_collapse.utilities.trainer import save_checkpoint


class Warn(Action):
    """Says the new verdicts in one message of the logger ``lightning_collapse``, which shows on the console."""

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Say them on the first process."""
        rank_zero_say(f"`CollapseGuard` at step {judgement.step}:\n{_in_words(judgement)}")
        return None


class Log(Action):
    """Sends the new verdicts to every logger: as text, and as data to those that keep a file of events."""

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Log ``guard/verdict`` and ``guard/verdict_json``."""
        for logger in trainer.loggers:
            log_text(logger, "guard/verdict", _in_words(judgement), judgement.step)
            log_data(logger, "guard/verdict_json", verdict_records(judgement.new), judgement.step)
        return None


class SaveCheckpoint(Action):
    """Saves a checkpoint named after the first new verdict and its step."""

    dirpath: str | None = None

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """Note where to save."""
        self.dirpath = dirpath

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Save. Collective."""
        if not trainer.fast_dev_run:
            name = f"{judgement.new[0].kind}-step={judgement.step}.ckpt"
            save_checkpoint(trainer, os.path.join(checkpoint_folder(trainer, self.dirpath), name), "CollapseGuard")
        return None


class Stop(Action):
    """Ends the fit after the running batch; does not go with actions that keep training going."""

    def check(self, others: Sequence[Action], kinds: Sequence[str]) -> None:
        """Refuse to be listed beside an action whose attribute ``goes_on`` is true."""
        if going_on := [other for other in others if getattr(other, "goes_on", False)]:
            names = " and ".join(f"`{type(other).__name__}`" for other in going_on)
            raise ValueError(f"`action` has both 'stop', which ends the fit, and {names}, to go on with it. Keep one.")

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Ask the trainer to stop."""
        trainer.should_stop = True
        return None


BUILTIN: dict[str, Callable[[], Action]] = {"warn": Warn, "log": Log, "checkpoint": SaveCheckpoint, "stop": Stop}
"""By the name that ``CollapseGuard(action=...)`` takes."""


def _in_words(judgement: Judgement) -> str:
    return "\n".join(f"- {verdict}" for verdict in judgement.new)
