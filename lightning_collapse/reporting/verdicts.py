"""Verdicts as data: what the guard writes into an event file, and what is read back from it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lightning_collapse.reporting.events import Run
from lightning_collapse.rules import RULES, Verdict
from lightning_collapse.rules.verdict import also_in_words

SCHEMA = 1
"""Version of the records; a reader leaves out those of a version that it does not know."""
TEXT, DATA = "guard/verdict", "guard/verdict_json"
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
        severity: How far beyond the line of its rule; NaN where that was not logged.
        also: Where else it shows, and as what, in words.
        says: The failure in one plain sentence; empty where that was not logged.
        outcome: Whether the outcome that the guard watched had moved by then, in words; empty if it watched none.
        advice: What addresses it in this run; empty where that was not logged.
    """

    kind: str
    layer: str
    since: int
    step: int
    until: int
    evidence: str = ""
    severity: float = float("nan")
    also: tuple[str, ...] = ()
    says: str = ""
    outcome: str = ""
    advice: str = ""

    def __str__(self) -> str:
        return self.kind.replace("_", " ")

    @property
    def told(self) -> str:
        """The evidence, where else it shows, and whether the outcome has moved, in words."""
        also = f"; {also_in_words(self.also)}" if self.also else ""
        return f"{self.evidence}{also}; {self.outcome}" if self.outcome else f"{self.evidence}{also}"


def verdict_records(verdicts: Sequence[Verdict]) -> list[str]:
    """Each verdict as one line of JSON: the fields of :class:`~lightning_collapse.rules.Verdict`, all of them.

    Numbers that JSON does not know are strings: a severity may be ``"inf"``.

    Example:
        >>> verdict_records([Verdict("non_finite", "z", 29, 39, "all is lost", severity=float("inf"))])[0][:63]
        '{"schema": 1, "kind": "non_finite", "layer": "z", "since": 29, '
    """
    states = [verdict.as_dict() for verdict in verdicts]
    return [json.dumps({"schema": SCHEMA, **state, "severity": _number(state["severity"])}) for state in states]


def find_verdicts(run: Run) -> list[Finding]:
    """Every verdict of a run, in the order of the steps since when: from data, in older runs from words and counts.

    Where verdicts were logged, what is only counted is part of one of them and no further verdict; but notices, of
    which only the count is logged, are told.

    Example:
        >>> run = Run("a", texts={"guard/verdict": {39: "- complete collapse in `z` since step 29: all is still."}})
        >>> [finding.told for finding in find_verdicts(run)]
        ['all is still']
    """
    counts = {found[1]: curve for tag, curve in run.scalars.items() if (found := _COUNT.fullmatch(tag))}
    # what was written twice, as after a resume, is one
    verdicts = dict.fromkeys(_from_data(run.texts[DATA]) if DATA in run.texts else _from_words(run.texts.get(TEXT, {})))
    findings = [
        Finding(
            verdict.kind,
            verdict.layer,
            verdict.since,
            verdict.step,
            _until(counts.get(verdict.kind, {}), verdict.step, run.last_step),
            verdict.evidence,
            verdict.severity,
            tuple(verdict.also),
            verdict.says,
            verdict.outcome,
            verdict.advice,
        )
        for verdict in verdicts
    ]
    only_counted = not findings
    for kind, curve in counts.items():
        until = -1
        is_notice = kind in RULES and RULES[kind].informative
        for step, count in curve.items() if is_notice or only_counted else ():
            if count > 0 and step > until:
                until = _until(curve, step, run.last_step)
                findings.append(Finding(kind, "", step, step, until))
    return sorted(findings, key=lambda finding: (finding.since, finding.step))


def _from_data(texts: Mapping[int, str]) -> Iterator[Verdict]:
    for line in "\n".join(texts.values()).splitlines():
        with suppress(ValueError, TypeError, KeyError):  # of a later version, or not written by a guard
            yield _verdict(json.loads(line))


def _verdict(record: Any) -> Verdict:
    if record["schema"] != SCHEMA:
        raise ValueError(record["schema"])
    kind, layer, evidence, advice = (str(record[name]) for name in ("kind", "layer", "evidence", "advice"))
    also = tuple(map(str, record["also"]))
    says, outcome = (str(record.get(name, "")) for name in ("says", "outcome"))
    since, step, severity = int(record["since"]), int(record["step"]), float(record["severity"])
    return Verdict(kind, layer, since, step, evidence, severity, advice, also, says, outcome)


def _from_words(texts: Mapping[int, str]) -> Iterator[Verdict]:
    """Runs of version 0.1.0 have no data."""
    for step, words in texts.items():
        for line in words.splitlines():
            if found := _WORDS.fullmatch(line):
                kind = found["kind"].replace(" ", "_")
                # the guard ends with its advice, which is the rule's and not of this run
                advice = f" {RULES[kind].advice}" if kind in RULES else ""
                evidence = f"{found['evidence']}.".removesuffix(advice).removesuffix(".")
                evidence, _, also = evidence.partition("; also ")
                places = tuple(also.split(", ")) if also else ()
                yield Verdict(kind, found["layer"], int(found["since"]), step, evidence, float("nan"), also=places)


def _number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


def _until(counts: Mapping[int, float], step: int, last: int) -> int:
    return next((later for later, count in counts.items() if later > step and count == 0), last)
