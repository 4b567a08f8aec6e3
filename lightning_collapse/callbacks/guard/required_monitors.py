"""Required monitors: which callbacks draw the curves that a rule reads, and the lines that add them to a trainer."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import isabstract
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_collapse.rules import OUTCOME, NonFinite, PrototypeCollapse, Rule
from lightning_collapse.utilities.registry import CURVES


def available(rules: Mapping[str, Rule], callbacks: Sequence[Callback]) -> frozenset[str]:
    """Kinds of the rules whose curves a callback draws."""
    return frozenset(kind for kind, rule in rules.items() if any(_draws(callback, rule) for callback in callbacks))


def require_available(rules: Mapping[str, Rule], callbacks: Sequence[Callback], requested: bool) -> None:
    """Refuse to judge what nobody draws.

    Args:
        rules: The rules to be judged by, by kind.
        callbacks: All of the trainer.
        requested: Whether every one of them was asked for; else one is enough.

    Raises:
        MisconfigurationException: With the line to add.
    """
    # an outcome is drawn by the guard itself
    rules = {kind: rule for kind, rule in rules.items() if rule.family != OUTCOME}
    judged = available(rules, callbacks)
    missing = [rule for kind, rule in rules.items() if kind not in judged]
    if requested and missing:
        raise MisconfigurationException(
            "; ".join(
                f"`CollapseGuard(rules=[{rule.kind!r}])` reads the curves {', '.join(rule.measures)} of {rule.family},"
                f" which no callback of the trainer draws. Add {_lines([rule])} to its `callbacks`"
                for rule in missing
            )
            + "."
        )
    # that a monitor counts NaN, or what a softmax chooses, does not mean that it draws what shows a collapse
    if not requested and not judged - {NonFinite.kind, PrototypeCollapse.kind}:
        needed = "; ".join(f"of {rule.family} {', '.join(rule.measures)}" for rule in rules.values())
        raise MisconfigurationException(
            "`CollapseGuard` reads the curves of monitors, and no monitor of the trainer draws all that one of its"
            f" rules needs. Add `CollapseMonitor()`, or for other rules {_lines(list(rules.values()))};"
            f" with `measures` of your own these must be among them: {needed}."
        )


def _draws(callback: Callback, rule: Rule) -> bool:
    family = getattr(callback, "family", "")
    drawn = getattr(callback, "curves", [curve.name for curve in CURVES.values() if curve.family == family])
    return bool(family == rule.family and set(rule.measures) <= set(drawn))


def _lines(rules: Sequence[Rule]) -> str:
    families = {rule.family for rule in rules}
    ours = {cls.__name__ for rule in rules for cls in _drawing(rule)}
    return " or ".join(f"`{name}()`" for name in sorted(ours)) or f"one that draws {', '.join(sorted(families))}"


def _drawing(rule: Rule) -> list[type[Any]]:
    """Ours of the family of a rule; of several those that declare all of its curves, if any does."""
    family = [cls for cls in _subclasses(Callback) if getattr(cls, "family", "") == rule.family and _is_ours(cls)]
    declared = [cls for cls in family if set(rule.measures) <= {curve.name for curve in getattr(cls, "declares", ())}]
    return declared or family


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    subclasses: list[type[Any]] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("lightning_collapse.") and not isabstract(cls)
