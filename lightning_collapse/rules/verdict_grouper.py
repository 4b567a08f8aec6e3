"""Verdict grouping: what fails together has one cause and is said once."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lightning_collapse.rules.base import RULES
from lightning_collapse.rules.verdict import Verdict

Place = tuple[str, str]
"""Kind and layer of a failure."""


class VerdictGrouper:
    """Sorts verdicts into new ones and those that only show an earlier one in another place.

    Failures of one family have one cause if they are triggered at one point, or within ``patience`` points after the
    last of them while one of them is active. The verdict names the one that began first; of those the first layer, in
    the order of the monitor; in one layer the most severe kind. The others are added to what it says. A kind that an
    active one of the same layer supersedes, such as few directions where all rows are equal, is not said at all.

    Args:
        patience: How many points apart they may be.

    Example:
        >>> from lightning_collapse.rules import Judge, Verdict
        >>> grouper, verdicts = VerdictGrouper(patience=2), []
        >>> first = Verdict("complete_collapse", "encoder", 10, 20, "the spread is 0.1 %")
        >>> new = grouper.sort(verdicts, [first], ["collapse"], [("complete_collapse", "encoder")])
        >>> [verdict.layer for verdict in new]
        ['encoder']
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        # of every family: the index of its verdict and the points since it was last added to
        self._open: dict[str, list[int]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit must know."""
        return {family: list(entry) for family, entry in self._open.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self._open = {family: list(entry) for family, entry in state_dict.items()}

    def clear(self) -> None:
        """Take what is triggered next for new."""
        self._open.clear()

    def sort(
        self,
        verdicts: list[Verdict],
        triggered: Sequence[Verdict],
        families: Collection[str],
        active: Collection[Place],
    ) -> list[Verdict]:
        """Add what is triggered at one point to ``verdicts``, to an earlier entry where it has the same cause.

        Args:
            verdicts: All so far; changed in place.
            triggered: What is triggered now, layers in their order.
            families: Of the points just judged.
            active: Every failure that is active, those that are triggered now included.

        Returns:
            The new entries.
        """
        new = []
        for family in families:
            own = [verdict for verdict in triggered if RULES[verdict.kind].family == family]
            own = [verdict for verdict in own if not _is_superseded(verdict, active)]
            if family in self._open:
                self._open[family][1] += 1
                if self._open[family][1] > self.patience or not _was_active(family, own, active):
                    del self._open[family]
            if not own:
                continue
            if family in self._open:
                index, others = self._open[family][0], own
            else:
                layers = list(dict.fromkeys(verdict.layer for verdict in own))
                first = min(own, key=lambda v: (v.since, layers.index(v.layer), -v.severity))
                index, others = len(verdicts), [verdict for verdict in own if verdict is not first]
                verdicts.append(first)
                new.append(index)
            names = [_place(verdict, verdicts[index]) for verdict in others]
            also = tuple(dict.fromkeys([*verdicts[index].also, *names]))
            verdicts[index] = replace(verdicts[index], also=also)
            self._open[family] = [index, 0]
        return [verdicts[index] for index in new]


def _place(verdict: Verdict, first: Verdict) -> str:
    return f"in `{verdict.layer}`" if verdict.kind == first.kind else verdict.name


def _is_superseded(verdict: Verdict, active: Collection[Place]) -> bool:
    graver = (rule.kind for rule in RULES.values() if verdict.kind in rule.supersedes)
    return any((kind, verdict.layer) in active for kind in graver)


def _was_active(family: str, triggered: Sequence[Verdict], active: Collection[Place]) -> bool:
    """Whether a failure of the family is active that has not just been triggered."""
    kinds = {rule.kind for rule in RULES.values() if rule.family == family}
    just = {(verdict.kind, verdict.layer) for verdict in triggered}
    return any(place[0] in kinds and place not in just for place in active)
