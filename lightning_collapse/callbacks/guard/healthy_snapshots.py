"""Healthy snapshots: the last few states of training at which nothing looked ill, each in a file of its own."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from lightning.pytorch import Trainer

from lightning_collapse.callbacks.guard.training_state import capture, describe, difference
from lightning_collapse.utilities.trainer import remove_checkpoint, save_state


@dataclass(frozen=True)
class Snapshot:
    """A state of training on disk.

    Attributes:
        path: Of its file.
        step: Its optimizer step, as :func:`~lightning_collapse.utilities.trainer.logging_step` counts.
        returns: How often training had been turned back before it was saved.
    """

    path: str
    step: int
    returns: int


class HealthySnapshots:
    """Keeps the newest states that were given to it, and removes the files of older ones.

    A failure is noticed some time after its onset, and what was saved in between already has it: hence more than one.

    Args:
        keep: How many.

    Attributes:
        kept: Those on disk, oldest first.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.kept: list[Snapshot] = []
        self._run = ""
        self._description: dict[str, Any] = {}

    def needs(self, trainer: Trainer, step: int, every: int) -> bool:
        """Whether the newest is ``every`` steps old, or of no use any more because the training has changed since."""
        old = not self.kept or step - self.kept[-1].step >= every
        return old or bool(self.changed(trainer))

    def changed(self, trainer: Trainer) -> str:
        """In which respect the training differs from what was saved, in words; empty if in none."""
        return difference(self._description, describe(trainer))

    def save(self, trainer: Trainer, folder: str, step: int, returns: int) -> None:
        """Save the present state, and remove what is too old, or of no use any more. Collective."""
        if not self._run:  # runs may share a folder
            self._run = trainer.strategy.broadcast(uuid4().hex[:8])
        path = os.path.join(folder, f"healthy-{self._run}-step={step}.ckpt")
        if not save_state(trainer, lambda: capture(trainer), path, "Rollback"):
            return
        useless = self.kept if self.changed(trainer) else [old for old in self.kept if old.step >= step]
        self._description = describe(trainer)
        kept = [old for old in self.kept if old not in useless]
        self._replace(trainer, [*kept, Snapshot(path, step, returns)][-self.keep :])

    def before(self, onset: int, margin: int) -> list[Snapshot]:
        """All, those to be preferred first: the newest that lies ``margin`` steps before the onset, and older ones.

        Then those that are too new, the oldest of them first.
        """
        early = [one for one in self.kept if one.step <= onset - margin]
        return early[::-1] + self.kept[len(early) :]

    def drop_after(self, trainer: Trainer, step: int) -> None:
        """Remove those that are newer than a step."""
        self._replace(trainer, [one for one in self.kept if one.step <= step])

    def _replace(self, trainer: Trainer, kept: list[Snapshot]) -> None:
        paths = {one.path for one in kept}
        gone = [one.path for one in self.kept if one.path not in paths]
        self.kept = kept
        for path in gone:
            remove_checkpoint(trainer, path, "Rollback")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"run": self._run, "kept": [asdict(one) for one in self.kept], "description": self._description}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._run, self._description = state_dict["run"], state_dict["description"]
        self.kept = [Snapshot(**one) for one in state_dict["kept"]]
