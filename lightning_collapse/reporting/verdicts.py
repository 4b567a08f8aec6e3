"""What the guard said, read back from its words and counts in an event file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_collapse.reporting.events import Run
from lightning_collapse.rules import RULES

_WORDS = re.compile(r"- (?P<kind>\w[\w ]*) in `(?P<layer>.*)` since step (?P<since>\d+): (?P<evidence>.*)\.")
_COUNT = re.compile(r"(?:.*-)?guard/(\w+)")


@dataclass(frozen=True)
class Finding:
    """A verdict of :class:`~lightning_collapse.CollapseGuard` in a run that is over.

    Attributes:
        kind: Name of the failure, such as ``"complete_collapse"``.
        layer: Name of the layer; empty where only the count of layers was logged, as without ``action="log"``.
        since: Step of the first point that showed it; where only counts were logged, ``step``.
        step: Step at which it was said.
        until: Step at which no layer was so judged any more, or the last one of the run.
        evidence: The numbers it rests on, in words; empty where only the count was logged.
    """

    kind: str
    layer: str
    since: int
    step: int
    until: int
    evidence: str = ""

    def __str__(self) -> str:
        return self.kind.replace("_", " ")


def find_verdicts(run: Run) -> list[Finding]:
    """Every verdict of a run, in the order of the steps since when.

    Example:
        >>> run = Run("a", texts={"guard/verdict": {39: "- complete collapse in `z` since step 29: all is still."}})
        >>> find_verdicts(run)
        [Finding(kind='complete_collapse', layer='z', since=29, step=39, until=39, evidence='all is still')]
    """
    counts = {found[1]: curve for tag, curve in run.scalars.items() if (found := _COUNT.fullmatch(tag))}
    findings = []
    for step, words in run.texts.get("guard/verdict", {}).items():
        for line in words.splitlines():
            if found := _WORDS.fullmatch(line):
                kind = found["kind"].replace(" ", "_")
                until = _until(counts.get(kind, {}), step, run.last_step)
                # the guard ends with its advice, which is the rule's and not of this run
                advice = f" {RULES[kind].advice}" if kind in RULES else ""
                evidence = f"{found['evidence']}.".removesuffix(advice).removesuffix(".")
                findings.append(Finding(kind, found["layer"], int(found["since"]), step, until, evidence))
    said = {finding.kind for finding in findings}
    for kind, curve in counts.items():
        until = -1
        for step, count in curve.items() if kind not in said else ():
            if count > 0 and step > until:
                until = _until(curve, step, run.last_step)
                findings.append(Finding(kind, "", step, step, until))
    return sorted(findings, key=lambda finding: (finding.since, finding.step))


def _until(counts: Mapping[int, float], step: int, last: int) -> int:
    return next((later for later, count in counts.items() if later > step and count == 0), last)
