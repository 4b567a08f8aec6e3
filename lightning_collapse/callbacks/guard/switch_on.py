"""Adaptive regularization weight: raised while a verdict is active, lowered again after it."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_collapse.callbacks.guard.action import Action
from lightning_collapse.callbacks.loss_terms.auxiliary_loss import AuxiliaryLoss
from lightning_collapse.losses.schedule import Weight
from lightning_collapse.reporting import publish
from lightning_collapse.rules import RULES, Judgement
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.trainer import logging_step


class SwitchOn(Action):
    """Action of ``CollapseGuard``: raise a regularizer's weight while a verdict is active.

    The weight that the regularizer was given becomes its full weight, and what is applied is a share of it: 0 when the
    fit starts, so that training is as without it; from a verdict on the share grows by ``1 / ramp`` a step to 1. Once
    there, and once the guard has lifted the verdict, it is lowered by ``1 / fade`` a step. So that it does not go up
    and down for ever, it is lowered less each time: to 0 after the first verdict, to ``k / times`` after ``k`` more,
    and after ``times`` more not at all. The share is published as ``guard/switch_on/{name}``.

    It depends on the verdicts and the step alone: every process sets the same, and a resumed fit goes on. At a share of
    0 the regularizer is evaluated all the same, and its running statistics, if it has any, are kept up.

    Args:
        name: Name of a ``Regularizer`` among the trainer's callbacks, or of a regularizer of ``AntiCollapseMixin``.
        ramp: Optimizer steps from 0 to the full weight.
        fade: Optimizer steps from the full weight back to 0; slow, since a collapse returns slowly too.
        times: How often it is lowered.
        kinds: Verdicts that raise it, of those that ``CollapseGuard`` has as ``rules``.

    Raises:
        ValueError: If an argument is out of range, or there is no verdict of a kind.
        MisconfigurationException: When the fit starts, if there is no regularizer of that name.

    Example::

        guard = CollapseGuard(action=["warn", SwitchOn("vicreg", ramp=100)])
        trainer = Trainer(callbacks=[CollapseMonitor(), Regularizer(VICReg(), layer="projector"), guard])
    """

    goes_on = True

    def __init__(
        self,
        name: str,
        ramp: int = 100,
        fade: int = 1000,
        times: int = 3,
        kinds: Sequence[str] = ("complete_collapse", "dimensional_collapse"),
    ) -> None:
        for argument, number in (("ramp", ramp), ("fade", fade), ("times", times)):
            if number < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {number}.")
        if isinstance(kinds, str) or not kinds or not set(kinds) <= set(RULES):
            raise ValueError(f"`kinds` takes a list out of {', '.join(sorted(RULES))}, got {kinds!r}.")
        self.name, self.ramp, self.fade, self.times, self.kinds = name, ramp, fade, times, tuple(kinds)
        self._restore: Callable[[], None] | None = None
        self._triggered = 0
        self._up = False
        # the share at a step, from which it moves on
        self._share, self._step = 0.0, 0

    def check(self, others: Sequence[Action], kinds: Sequence[str]) -> None:
        """Refuse another one of the same name, and kinds that are not judged."""
        if any(isinstance(other, SwitchOn) and other.name == self.name for other in others):
            raise ValueError(f"`action` has several `SwitchOn({self.name!r})`, which would set one weight. Keep one.")
        if not set(self.kinds) & set(kinds):
            raise ValueError(
                f"`SwitchOn({self.name!r})` waits for {', '.join(self.kinds)}, and the guard judges"
                f" {', '.join(kinds)}. Choose other `kinds` or `rules`."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {"triggered": self._triggered, "up": self._up, "share": self._share, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._triggered, self._up = state_dict["triggered"], state_dict["up"]
        self._share, self._step = state_dict["share"], state_dict["step"]

    @property
    def floor(self) -> float:
        """The share it is lowered to."""
        return min(max(self._triggered - 1, 0) / self.times, 1.0)

    def share(self, step: int) -> float:
        """The share of the full weight at a step."""
        if self._up:
            return min(self._share + (step - self._step) / self.ramp, 1.0)
        return max(self._share - (step - self._step) / self.fade, min(self.floor, self._share))

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """Raise or lower the weight, and publish its share."""
        step = logging_step(trainer)
        self.update(step, judgement.is_active(*self.kinds))
        publish(trainer, pl_module, [Point("guard", "switch_on", self.name, judgement.step, self.share(step))])

    def update(self, step: int, active: bool) -> None:
        """Raise or lower it, now that the points of a step are judged."""
        if active and not self._up:
            self._share, self._step, self._up = self.share(step), step, True
            self._triggered += 1
            rank_zero_info(f"`SwitchOn` at step {step}: the weight of {self.name!r} is raised.")
        elif not active and self._up and self.share(step) == 1 and self.floor < 1:
            self._share, self._step, self._up = 1.0, step, False
            rank_zero_info(f"`SwitchOn` at step {step}: the weight of {self.name!r} is lowered again.")

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """Take over the weight.

        Raises:
            MisconfigurationException: If there is no regularizer of that name.
        """
        self.detach()
        terms = {term.name: term for term in trainer.callbacks if isinstance(term, AuxiliaryLoss)}
        within: MutableMapping[str, Any] = getattr(pl_module, "regularizers", None) or {}  # of `AntiCollapseMixin`
        if self.name in terms:
            term = terms[self.name]
            full = term.weight
            term.weight = self._shared(full)
            self._restore = lambda: setattr(term, "weight", full)
        elif self.name in within:
            entry = within[self.name]
            within[self.name] = (self._shared(entry[0]), entry[1])
            self._restore = lambda: within.update({self.name: entry})
        else:
            names = ", ".join(map(repr, sorted({*terms, *within}))) or "none"
            raise MisconfigurationException(
                f"`SwitchOn({self.name!r})` finds no regularizer of that name; there is {names}. Add"
                f" `Regularizer(..., name={self.name!r})` to the callbacks, or use `set_regularizers` of"
                " `AntiCollapseMixin`."
            )

    def detach(self) -> None:
        """Give the full weight back; may be called more than once."""
        if self._restore is not None:
            self._restore()
        self._restore = None

    def _shared(self, full: Weight) -> Callable[[int], float]:
        constant = 0.0 if callable(full) else float(full)  # once: a tensor may lie on a device

        def weight(step: int) -> float:
            return (full(step) if callable(full) else constant) * self.share(step)

        return weight
