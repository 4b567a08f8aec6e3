"""Coverage: which layers were judged, at how many points, and why others were not."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from lightning_collapse.rules.base import ALL, Rule
from lightning_collapse.rules.task import Task
from lightning_collapse.rules.verdict import Verdict
from lightning_collapse.utilities.points import Flag, Point

NO_LAYERS = ("continual", "scalars", "outcome", "regularizer", "penalty")
"""Families whose curves are of tasks, metrics and losses, and not of layers."""
NAMED = 4
"""How many failures, and layers that were not judged, one line names."""
UNREAD = {
    Flag.NOT_CALLED: "it did not run, or returned no rows",
    Flag.FEW_ROWS: "it has too few rows",
    Flag.SOLVER: "no solver converged",
    Flag.CONSTANT: "all of its rows are equal",
}


class Coverage:
    """What was judged in a run so far.

    That a layer is finite is asked of every one; it counts as judged if something else was asked of it too, or if
    nothing else is asked at all.

    Attributes:
        points: Steps at which something was judged.
        judged: Names of the layers that were, at one point at least.
        left_out: Why the others that had points were not, in words, by name; of the latest point.

    Example:
        >>> from lightning_collapse.rules import Judge
        >>> judge = Judge(["non_finite"])
        >>> _ = judge.update([Point("collapse", "encoder", "nonfinite_fraction", 9, 0.0, n=64)])
        >>> judge.coverage.points, judge.coverage.judged
        (1, {'encoder'})
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: a new run begins."""
        self.points = 0
        self._first: set[str] | None = None
        self.judged: set[str] = set()
        self.left_out: dict[str, str] = {}

    def update(
        self, rules: Sequence[Rule], families: Mapping[str, Mapping[str, Mapping[str, Point]]], task: Task
    ) -> None:
        """Take note of the points of one step, by family, layer and measure, and of the rules that read them."""
        seen: dict[str, None] = {}
        judged: set[str] = set()
        any_judged = False
        asked = [rule for rule in rules if rule.kind != "non_finite"] or rules
        for rule in asked:
            layers = families[rule.family]
            names = [name for name, points in layers.items() if rule.applies_to(name, task) and rule.readable(points)]
            any_judged = any_judged or bool(names)
            if rule.family not in NO_LAYERS:
                # a rule about what sums up all layers is about each of them
                judged |= set(layers if ALL in names else names)
                seen |= dict.fromkeys(layers)
        self.points += any_judged
        self.judged |= judged
        self.judged -= {"", ALL}
        others = [name for name in seen if name not in self.judged and name not in ("", ALL)]
        families_of = {name: [(rule, families[rule.family].get(name, {})) for rule in asked] for name in others}
        self.left_out |= {name: _why(name, read, task) for name, read in families_of.items()}
        # what has points at the first step alone was a default layer until it was known what runs
        gone = set[str]() if self._first is None else self._first - seen.keys()
        self._first = set(seen) if self._first is None else self._first & gone
        self.left_out = {name: why for name, why in self.left_out.items() if why and name not in self.judged | gone}

    def in_words(self, verdicts: Sequence[Verdict]) -> str:
        """One line: how many failures there were, where they were looked for, and where not.

        Example:
            >>> coverage = Coverage()
            >>> coverage.points, coverage.judged = 40, {"encoder", "head"}
            >>> coverage.left_out = {"embed": "it did not run"}
            >>> coverage.in_words([])
            'no failure found in 2 layers over 40 points; 1 layer not judged: `embed` (it did not run)'
        """
        found = [f"{verdict.name} since step {verdict.since}" for verdict in verdicts]
        words = f"{counted(len(found), 'failure') if found else 'no failure'} found"
        if not self.points:
            words = f"{words}, " if found else ""
            words += "nothing judged: there was no point that a rule can read"
        elif self.judged:
            words += f" in {counted(len(self.judged), 'layer')}"
        words += f" over {counted(self.points, 'point')}" if self.points else ""
        words += f": {_some(found)}" if found else ""
        left_out = [f"`{name}` ({why})" for name, why in self.left_out.items()]
        return words + (f"; {counted(len(left_out), 'layer')} not judged: {_some(left_out)}" if left_out else "")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: a number and a list of strings."""
        return {"points": self.points, "judged": sorted(self.judged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of the run left off."""
        self.clear()
        self.points, self.judged = int(state["points"]), set(state["judged"])


def _why(layer: str, read: Sequence[tuple[Rule, Mapping[str, Point]]], task: Task) -> str:
    """Why nothing was said of a layer; empty where rules are not about its curves, as of what writes to a stream."""
    if layer in task.reasons or layer in task.conditioning:
        return task.reasons.get(layer, "it holds few directions by design")
    if layer in task.outputs:
        return "the loss compares its outputs with targets"
    flags = [UNREAD[point.flag] for _, points in read for point in points.values() if point.flag in UNREAD]
    if flags:
        return flags[0]
    drawn = [
        (name, points[name]) for rule, points in read if points.keys() >= {*rule.measures} for name in rule.measures
    ]
    blank = [f"`{name}` is no number" for name, point in drawn if not isfinite(point.value)]
    return blank[0] if blank else "no rule is about it" if drawn else ""


def counted(number: int, noun: str) -> str:
    """A number of things in words.

    Example:
        >>> counted(1, "layer"), counted(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
