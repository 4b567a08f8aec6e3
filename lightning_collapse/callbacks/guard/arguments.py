"""Arguments of the guard: what it may be told to judge and to do."""

from collections.abc import Callable, Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.callbacks.guard.action import Action, CallAction, ChecksOthers
from lightning_collapse.callbacks.guard.builtin_actions import BUILTIN
from lightning_collapse.callbacks.guard.outcome_reader import OutcomeReader
from lightning_collapse.rules import MODES, RULES, TASKS, OutcomeDrop, Verdict

ActionLike = (
    Literal["warn", "log", "checkpoint", "stop"] | Action | Callable[[Trainer, LightningModule, Verdict], object]
)


def check_rules(rules: Sequence[str] | None, task: str | None) -> None:
    """Refuse unknown kinds and tasks, and kinds that are not about the task.

    Raises:
        ValueError: With what there is.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, or None to infer it, got {task!r}.")
    if rules is None:
        return
    if isinstance(rules, str) or not rules or not set(rules) <= set(RULES):
        raise ValueError(f"`rules` takes a list out of {', '.join(sorted(RULES))}, got {rules!r}.")
    for kind in rules:
        if task and RULES[kind].tasks and task not in RULES[kind].tasks:
            about = " and ".join(RULES[kind].tasks)
            raise ValueError(f"`rules` has {kind!r}, which is about {about}, and `task` is {task!r}. Drop one of them.")


def make_outcome(outcome: str | None, mode: str | None, rules: Sequence[str] | None) -> OutcomeReader | None:
    """The reader of the outcome to be watched, ``None`` if there is none.

    Raises:
        ValueError: On one of the two without the other, an unknown mode, or a rule about an outcome without one.
    """
    modes = " or ".join(map(repr, MODES))
    if outcome is None:
        if mode is not None:
            raise ValueError(f"`mode` is {mode!r} and `outcome` is missing. Name a logged metric, or drop `mode`.")
        if rules is not None and OutcomeDrop.kind in rules:
            raise ValueError(f"`rules` has {OutcomeDrop.kind!r}, which needs `outcome`, the name of a logged metric.")
        return None
    if not isinstance(outcome, str) or not outcome:
        raise ValueError(f"`outcome` takes the name of a logged metric, such as 'val_acc', got {outcome!r}.")
    if mode not in MODES:
        raise ValueError(f"`mode` must be {modes}, what is best of `outcome`, got {mode!r}.")
    return OutcomeReader(outcome, mode)


def make_actions(action: ActionLike | Sequence[ActionLike], kinds: Sequence[str]) -> list[Action]:
    """The actions, in order, of a guard that judges ``kinds``.

    Raises:
        ValueError: If one is none, or two of them cannot both be done.
    """
    several = isinstance(action, Sequence) and not isinstance(action, str)
    given: Sequence[ActionLike] = action if several else [action]  # type: ignore[assignment, list-item]
    actions = [_make(one) for one in given]
    for i, one in enumerate(actions):
        if isinstance(one, ChecksOthers):
            one.check([*actions[:i], *actions[i + 1 :]], kinds)
    return actions


def _make(action: ActionLike) -> Action:
    if isinstance(action, type):  # callable too: its constructor would be given a trainer when a verdict is new
        raise ValueError(f"`action` takes an object, got the class `{action.__name__}`. Write `{action.__name__}()`.")
    if isinstance(action, str) and action in BUILTIN:
        return BUILTIN[action]()
    if isinstance(action, Action):
        return action
    if callable(action):
        return CallAction(action)
    raise ValueError(
        f"`action` must be among {', '.join(BUILTIN)}, a `Rollback`, a `SkipStep`, a `SwitchOn` or callable, got"
        f" {action!r}."
    )
