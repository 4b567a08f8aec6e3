"""Run view: the curves of a run in the groups of the dashboard, with what noise would read beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from re import compile
from typing import TypeVar

import numpy as np

from lightning_collapse.functional.isotropic_null import expected_under_isotropy
from lightning_collapse.reporting.dashboard import dashboard_layout, place
from lightning_collapse.reporting.events import Histograms, Run
from lightning_collapse.reporting.verdicts import Finding, find_verdicts
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import MEASURES

T = TypeVar("T")
Curve = Mapping[int, float]
_SPECTRUM = compile(r"(.*-)?(val/)?collapse/(.+)/log10_std")
_LOSS = compile(r"(.*[/_. -])?loss([/_. -].*)?")


@dataclass
class Board:
    """A run as the dashboard shows it.

    Attributes:
        run: What its event files say.
        charts: The curves, as ``charts[category][chart][line]``, in the order of the dashboard.
        health: Charts that say how far to trust the others, as ``(category, chart)``.
        losses: Curves of any tool whose name holds the word loss.
        spectra: Histograms of the standard deviations along the principal axes, by layer.
        findings: What the guard said.
    """

    run: Run
    charts: dict[str, dict[str, dict[str, Curve]]] = field(default_factory=dict)
    health: set[tuple[str, str]] = field(default_factory=set)
    losses: dict[str, Curve] = field(default_factory=dict)
    spectra: dict[str, Histograms] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def of(cls, run: Run) -> Board:
        """Group the curves of a run; those of other tools are left out."""
        board = cls(run, findings=find_verdicts(run))
        order = {name: list(charts) for name, charts in dashboard_layout().items()}
        board.charts = {name: {} for name in order}
        for tag, curve in run.scalars.items():
            if (at := place(tag)) is not None:
                board.charts[at.category].setdefault(at.chart, {})[at.line] = curve
                board.health |= {(at.category, at.chart)} if at.health else set()
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
        charts = [
            chart
            for name, charts in self.charts.items()
            if name not in ("Guard", "Regularizer")
            for chart in charts.values()
        ]
        return list(dict.fromkeys(line.removeprefix("val/") for lines in charts for line in lines))

    def null(self, category: str, chart: str, line: str) -> dict[int, float]:
        """What isotropic noise of the same size would read at every step, where that is known.

        The width of a layer is not logged. It is the number of its principal axes, once a point rests on more rows than
        these; with fewer the null stays unknown.
        """
        measure = next((m for m in MEASURES.values() if m.curve == chart), None)
        curve = self.charts.get(category, {}).get(chart, {}).get(line, {})
        health = self.charts.get(category, {})
        rows, flags = (health.get(name, {}).get(line, {}) for name in ("n", "flag"))
        if category != "Collapse" or measure is None or not rows:
            return {}
        widths = [
            round(sum(counts))
            for step, (_, counts) in self.spectra.get(line, {}).items()
            if rows.get(step, 0) > sum(counts) > 0
        ]
        if not widths or (measure.record and Flag.SKETCHED in flags.values()):
            return {}
        # of many sizes a few are asked: the null is smooth in n
        sizes = evenly(sorted({int(rows[step]) for step in curve if rows.get(step, 0) > 1}), 32)
        try:
            nulls = [expected_under_isotropy(measure.name, n, widths[-1]) for n in sizes]
        except Exception:  # a measure of the user's own
            return {}
        found = {step: float(np.interp(rows[step], sizes, nulls)) for step in curve if rows.get(step, 0) > 1}
        return {step: null for step, null in found.items() if null > 0}

    def last(self, category: str, chart: str, line: str) -> tuple[float, float]:
        """The last value of a curve and its null; NaN where there is none."""
        curve = self.charts.get(category, {}).get(chart, {}).get(line, {})
        step = max(curve, default=-1)
        return curve.get(step, nan), self.null(category, chart, line).get(step, nan)


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, both ends among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
