"""Streak: how many points in a row lie on one side of a line (hysteresis)."""

from dataclasses import dataclass
from enum import Enum

from lightning_collapse.rules.base import Rule


class Change(Enum):
    """What a point has changed."""

    TRIGGERED = "triggered"
    RECOVERED = "recovered"


@dataclass
class Streak:
    """The last points of one rule in one layer.

    Attributes:
        since: Step of the first of the bad points in a row.
        bad: How many there are.
        good: How many good points in a row there are.
        active: Whether the failure is active.
    """

    since: int = 0
    bad: int = 0
    good: int = 0
    active: bool = False

    def update(self, rule: Rule, patience: int, severity: float, step: int) -> Change | None:
        """Take another point in.

        Args:
            rule: Whose line it is.
            patience: Points in a row it takes, where the rule does not know better.
            severity: 1 or more is a bad point, less than the rule's ``healthy`` a good one; all else changes nothing.
            step: Step of the point.
        """
        patience = rule.patience or patience
        if severity >= 1:
            self.since, self.bad, self.good = (self.since if self.bad else step), self.bad + 1, 0
        elif severity < rule.healthy:
            self.bad, self.good = 0, self.good + 1
        if not self.active and self.bad >= patience:
            self.active = True
            return Change.TRIGGERED
        if self.active and self.good >= (rule.recovery or patience):
            self.active = False
            return Change.RECOVERED
        return None
