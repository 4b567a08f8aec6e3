"""Outcome reader: the score that a guard watches, read whenever it is logged."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, inf, isfinite
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_collapse.callbacks.monitors.logged_scalars import COUNT, VALUE, LoggedScalars
from lightning_collapse.monitoring.to_host import to_host
from lightning_collapse.rules import Outcome
from lightning_collapse.utilities.arguments import did_you_mean
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import batches_of_epoch, logging_step

Source = Literal["", "validation", "epoch", "late", "step"]
"""Where it is read: the end of a validation or of an epoch, after what the module logs when an epoch ends, at points of
the monitors; empty before it was seen."""


class OutcomeReader:
    """Reads one scalar of ``trainer.callback_metrics`` as an outcome, at the place of the loop where it first appears.

    That is the end of a validation or of an epoch, or a point of the monitors; a metric that is logged at each of them
    would be several curves in one.

    Args:
        name: Key of ``trainer.callback_metrics``.
        mode: ``"max"`` if higher is better, ``"min"`` if lower is.
    """

    def __init__(self, name: str, mode: str) -> None:
        self.outcome = Outcome(name, mode)
        self._logged = LoggedScalars([name])
        self.start(resumed=False)

    def start(self, resumed: bool) -> None:
        """A fit begins, from the start unless it is resumed."""
        self._logged.forget()
        self._validations = 0
        self._warned = False
        if not resumed:
            self._source: Source = ""
            self.outcome.clear()

    def before_validation(self, trainer: Trainer) -> None:
        """Take what training has logged for read."""
        self._validations += 1
        if not self._source:
            self._logged.note(trainer)

    def read(self, trainer: Trainer, pl_module: LightningModule, source: Source) -> list[Point]:
        """Points of the outcome if it was logged since, and is read at this place. Collective."""
        if self._source not in ("", source):
            return []
        name = self.outcome.name
        numbers = to_host(self._logged.readings(pl_module, self._logged.present(trainer), [name]))
        value, count = (float(numbers[name, of]) for of in (VALUE, COUNT))  # type: ignore[arg-type]
        if not count:
            return []
        self._source = source
        if not self.outcome.count:
            self.outcome.planned = planned_scores(trainer, source)
        return self.outcome.update(logging_step(trainer), value / count)

    def warn_if_missing(self, trainer: Trainer, at_last: bool = False) -> None:
        """Say once that nothing of this name is logged: when a first validation is over, and the fit goes on.

        Not right at its end: what training logs at the end of the epoch is still to come.
        """
        name, there = self.outcome.name, trainer.callback_metrics
        if self._warned or self.outcome.count or name in there or not (at_last or self._validations):
            return
        self._warned = True
        own = sorted(other for other in there if other.count("/") < 2)
        rank_zero_warn(
            f"`CollapseGuard(outcome={name!r})`: nothing is logged as {name!r}; there is {', '.join(own) or 'nothing'}."
            f"{did_you_mean(name, own)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"source": self._source, "outcome": self.outcome.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._source = state["source"]
        self.outcome.load_state_dict(state["outcome"])


def planned_scores(trainer: Trainer, source: Source) -> int | None:
    """How many points an outcome of this source will have in the whole fit, as far as the trainer tells."""
    batches = batches_of_epoch(trainer) or 0
    epochs = float(limit) if (limit := trainer.max_epochs) and limit > 0 else inf
    steps = float(trainer.max_steps) if trainer.max_steps > 0 else inf
    if batches:
        epochs = min(epochs, steps * trainer.accumulate_grad_batches / batches)
    if source == "step":
        steps = min(steps, epochs * batches / trainer.accumulate_grad_batches) if batches else steps
        points = steps / max(trainer.log_every_n_steps, 1)
    elif source in ("epoch", "late"):
        points = epochs
    else:
        every = float(trainer.val_check_batch or inf)
        in_epoch = max(batches / every, 1.0) if batches else 1.0
        points = epochs * batches / every if trainer.check_val_every_n_epoch is None else 0.0
        points = points or epochs / (trainer.check_val_every_n_epoch or 1) * in_epoch
    return max(ceil(points), 1) if isfinite(points) else None
