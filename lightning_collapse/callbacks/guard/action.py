"""Action: what a guard does about its verdicts."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.rules import Judgement, Verdict


@runtime_checkable
class Action(Protocol):
    """What :class:`~lightning_collapse.CollapseGuard` calls when a fit begins, at points, at new verdicts, at the end.

    Subclass it and write what you need: every method does nothing by default. A class that is no subclass must have all
    six. Calls are made on every process, with the same judgement. What a method raises when the fit begins ends the
    fit; later it costs the action and one warning. Two actions of one class are told apart in checkpoints by their
    attribute ``name``, if they have one.

    Example:
        >>> class LowerRate(Action):
        ...     def on_verdict(self, trainer, pl_module, judgement):
        ...         for group in trainer.optimizers[0].param_groups:
        ...             group["lr"] *= 0.5
        >>> isinstance(LowerRate(), Action)
        True
    """

    def attach(self, trainer: Trainer, pl_module: LightningModule, dirpath: str | None) -> None:
        """A fit begins; ``dirpath`` is the guard's, see :func:`checkpoint_folder`. May raise."""
        return

    def on_points(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> None:
        """Points have been judged; called at each of them, before :meth:`on_verdict`."""
        return

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """There are new verdicts; ``True`` if training was turned back, so that what fails next is taken for new."""
        return None

    def detach(self) -> None:
        """The fit is over, or has failed; may be called more than once."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` told; when a fit begins anew, from what it told at first."""
        return


@runtime_checkable
class ChecksOthers(Protocol):
    """An action that does not go with every other action, or with every choice of rules."""

    def check(self, others: Sequence[Action], kinds: Sequence[str]) -> None:
        """Called when the guard is made.

        Args:
            others: All other actions of the guard.
            kinds: What the guard judges.

        Raises:
            ValueError: If it cannot be done beside them.
        """


@runtime_checkable
class FollowsReturns(Protocol):
    """A callback of the trainer whose state goes on from step to step, and that is told when training was turned back.

    Example:
        >>> from lightning_collapse import StabilityMonitor
        >>> isinstance(StabilityMonitor(), FollowsReturns)
        True
    """

    def on_turned_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the points of a step, when an action has turned training back to an earlier state."""


class CallAction(Action):
    """A plain function as an action: called with the trainer, the module and each new verdict.

    Args:
        function: What to call.
    """

    def __init__(self, function: Callable[[Trainer, LightningModule, Verdict], object]) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, judgement: Judgement) -> bool | None:
        """Call the function."""
        for verdict in judgement.new:
            self.function(trainer, pl_module, verdict)
        return None


def action_name(action: Action) -> str:
    """What warnings and checkpoints call an action."""
    name = getattr(action, "name", "")
    return f"{type(action).__name__}({name!r})" if name else type(action).__name__


def checkpoint_folder(trainer: Trainer, dirpath: str | None) -> str:
    """Where an action saves: the guard's ``dirpath``, by default a folder ``guard`` beside the run's logs."""
    return dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "guard")


def states_of(actions: Sequence[Action]) -> dict[str, Any]:
    """States of the actions that have any, by name."""
    states = {action_name(action): action.state_dict() for action in actions}
    return {name: state for name, state in states.items() if state}


def load_states(actions: Sequence[Action], states: Mapping[str, Any]) -> None:
    """Give actions their states back; those without one stay as they are."""
    for action in actions:
        if action_name(action) in states:
            action.load_state_dict(states[action_name(action)])
