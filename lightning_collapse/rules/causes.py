"""One verdict per cause: what fails together is said once."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lightning_collapse.rules.base import RULES
from lightning_collapse.rules.verdict import Verdict


class VerdictGrouper:
    """Sorts verdicts into new ones and those that only show an earlier one in another place.

    Failures of one family have one cause if they fall at one point, or within ``patience`` points after the last of
    them while one of them stands. The verdict names the one that began first; of those the first layer, in the order
    of the monitor; in one layer the most severe kind. The others are added to what it says. A kind that a standing one
    of the same layer supersedes, such as few directions where all rows are equal, is not said at all.

    Args:
        patience: How many points apart they may be.
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
        """Take what falls next for new."""
        self._open.clear()

    def sort(
        self, verdicts: list[Verdict], fallen: Sequence[Verdict], families: Collection[str], standing: Collection[str]
    ) -> list[Verdict]:
        """Add what has fallen at one point to ``verdicts``, to an earlier entry where it has the same cause.

        Args:
            verdicts: All so far; changed in place.
            fallen: What falls now, layers in their order.
            families: Of the points just judged.
            standing: Every ``"kind/layer"`` that stands, those that fall now included.

        Returns:
            The new entries.
        """
        new = []
        for family in families:
            own = [verdict for verdict in fallen if RULES[verdict.kind].family == family]
            own = [verdict for verdict in own if not _is_superseded(verdict, standing)]
            if family in self._open:
                self._open[family][1] += 1
                if self._open[family][1] > self.patience or not _stands(family, own, standing):
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


def _is_superseded(verdict: Verdict, standing: Collection[str]) -> bool:
    graver = (rule.kind for rule in RULES.values() if verdict.kind in rule.supersedes)
    return any(f"{kind}/{verdict.layer}" in standing for kind in graver)


def _stands(family: str, fallen: Sequence[Verdict], standing: Collection[str]) -> bool:
    """Whether a failure of the family stands that has not just fallen."""
    kinds = {rule.kind for rule in RULES.values() if rule.family == family}
    just = {f"{verdict.kind}/{verdict.layer}" for verdict in fallen}
    return any(key.partition("/")[0] in kinds and key not in just for key in standing)
