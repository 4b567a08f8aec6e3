"""What a guard may be told to judge and to do."""

from collections.abc import Callable, Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_collapse.callbacks.guard.rollback import Rollback
from lightning_collapse.callbacks.guard.switch_on import SwitchOn
from lightning_collapse.rules import RULES, TASKS, Verdict

Action = (
    Literal["warn", "log", "checkpoint", "stop"]
    | Rollback
    | SwitchOn
    | Callable[[Trainer, LightningModule, Verdict], None]
)
ACTIONS = ("warn", "log", "checkpoint", "stop")


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


def check_actions(action: Action | Sequence[Action], kinds: Sequence[str]) -> list[Action]:
    """The actions, in order, of a guard that judges ``kinds``.

    Raises:
        ValueError: If one is none, or two of them cannot both be done.
    """
    several = isinstance(action, Sequence) and not isinstance(action, str)
    actions: list[Action] = list(action) if several else [action]  # type: ignore[list-item, arg-type]
    for one in actions:
        if isinstance(one, type):  # callable too: its constructor would be given a trainer when a verdict falls
            raise ValueError(f"`action` takes an object, got the class `{one.__name__}`. Write `{one.__name__}()`.")
        if not callable(one) and not isinstance(one, Rollback | SwitchOn) and one not in ACTIONS:
            raise ValueError(
                f"`action` must be among {', '.join(ACTIONS)}, a `Rollback`, a `SwitchOn` or callable, got {one!r}."
            )
    rollbacks = [one for one in actions if isinstance(one, Rollback)]
    switches = [one for one in actions if isinstance(one, SwitchOn)]
    if len(rollbacks) > 1:
        raise ValueError(f"`action` has {len(rollbacks)} `Rollback`s, which would undo each other. Keep one.")
    if "stop" in actions and (rollbacks or switches):
        names = " and ".join(f"`{type(one).__name__}`" for one in [*rollbacks, *switches])
        raise ValueError(f"`action` has both 'stop', which ends the fit, and {names}, to go on with it. Keep one.")
    names_on = [switch.name for switch in switches]
    for name in names_on:
        if names_on.count(name) > 1:
            raise ValueError(f"`action` has several `SwitchOn({name!r})`, which would set one weight. Keep one.")
    for switch in switches:
        if not set(switch.kinds) & set(kinds):
            raise ValueError(
                f"`SwitchOn({switch.name!r})` waits for {', '.join(switch.kinds)}, and the guard judges"
                f" {', '.join(kinds)}. Choose other `kinds` or `rules`."
            )
    return actions
