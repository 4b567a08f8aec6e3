"""Run view: the curves of a run in the groups of the dashboard, with what noise would read beside them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from re import compile
from typing import TypeVar

from lightning_collapse.reporting.dashboard import TRUST, Place, dashboard_layout, place
from lightning_collapse.reporting.events import Histograms, Run
from lightning_collapse.reporting.nulls import find_nulls
from lightning_collapse.reporting.verdicts import Finding, find_verdicts
from lightning_collapse.rules import ALL

T = TypeVar("T")
Curve = Mapping[int, float]
_NO_LAYERS = ("Guard", "Regularizer", "Penalty", "Scalars", "Outcome", "Continual", TRUST)
_SPECTRUM = compile(r"(.*-)?(val/)?collapse/(.+)/log10_std")
_LOSS = compile(r"(.*[/_. -])?loss([/_. -].*)?")


@dataclass
class Board:
    """A run as the dashboard shows it.

    Attributes:
        run: What its event files say.
        charts: The curves, as ``charts[category][chart][line]``, in the order of the dashboard.
        losses: Curves of any tool whose name holds the word loss.
        nulls: What noise would read at the steps of a curve, by its place, where that was logged.
        spectra: Histograms of the standard deviations along the principal axes, by layer.
        findings: What the guard said.
    """

    run: Run
    charts: dict[str, dict[str, dict[str, Curve]]] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    nulls: dict[Place, Curve] = field(default_factory=dict)
    spectra: dict[str, Histograms] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run) -> Board:
        """Group the curves of a run; those of other tools are left out."""
        board = cls(run, findings=find_verdicts(run))
        order = {name: list(charts) for name, charts in dashboard_layout().items()}
        board.charts = {name: {} for name in order}
        nulls = find_nulls(run)
        for tag, curve in run.scalars.items():
            if (at := place(tag)) is not None:
                board.nulls[at] = _at_steps_of(curve, _named(nulls, tag))
                board.charts[at.category].setdefault(at.chart, {})[at.line] = curve
            elif _LOSS.fullmatch(tag.lower()):
                board.losses[tag] = curve
        for category, charts in board.charts.items():
            known = {name: i for i, name in enumerate(order[category])}  # a measure of the user's own comes last
            board.charts[category] = dict(sorted(charts.items(), key=lambda item: known.get(item[0], len(known))))
        board.charts = {name: charts for name, charts in board.charts.items() if charts}
        for tag, histograms in run.histograms.items():
            if found := _SPECTRUM.fullmatch(tag):
                board.spectra[(found[2] or "") + found[3]] = histograms
        return board

    @property
    def layers(self) -> list[str]:
        """Every layer that has a curve, in the order of their first points."""
        lines = [
            line.removeprefix("val/")
            for category, charts in self.charts.items()
            if category not in _NO_LAYERS
            for lines in charts.values()
            for line in lines
        ]
        return [line for line in dict.fromkeys(lines) if line != ALL]

    @property
    def points(self) -> int:
        """Points of the curve that has most."""
        every = (curve for charts in self.charts.values() for lines in charts.values() for curve in lines.values())
        return max(map(len, every), default=0)

    def null(self, category: str, chart: str, line: str) -> Curve:
        """What noise of the same size would read at every step, where that was logged."""
        return self.nulls.get(Place(category, chart, line), {})

    def last(self, category: str, chart: str, line: str) -> tuple[float, float]:
        """The last value of a curve and its null; NaN where there is none."""
        curve = self.charts.get(category, {}).get(chart, {}).get(line, {})
        step = max(curve, default=-1)
        return curve.get(step, nan), self.null(category, chart, line).get(step, nan)


def _named(nulls: Mapping[str, Curve], tag: str) -> Curve:
    """The nulls of a curve; a logger may have put ``prefix-`` before its name."""
    found = nulls.get(tag)
    return found if found is not None else next((c for name, c in nulls.items() if tag.endswith(f"-{name}")), {})


def _at_steps_of(curve: Curve, nulls: Curve) -> Curve:
    """Each null holds until the next one."""
    steps = list(nulls)
    return {step: nulls[steps[i - 1]] for step in curve if (i := bisect_right(steps, step))}


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, both ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
