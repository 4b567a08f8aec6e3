"""TensorBoard dashboard: which chart draws which curve, read from the tables of measures and curves."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from lightning_collapse.utilities.registry import CURVES, MEASURES

HEALTH = ("n", "nonfinite_fraction", "flag")
"""Curves that say how far to trust the others; each is one chart, whatever the family."""
TRUST = "Health"
"""Title of the category of these."""
_ONE_CHART = {"regularizer": ".+", "penalty": "[^/]+", "guard": ".+"}
# the server anchors a pattern at the front only; `TensorBoardLogger(prefix=...)` puts "prefix-" there
_PREFIX = "(.*-)?(val/)?"


class Place(NamedTuple):
    """Where the dashboard draws a curve.

    Attributes:
        category: Title of the category, such as ``"Neural collapse"``.
        chart: Name of the chart in it: that of the measure.
        line: Name of the line in the chart: the layer, or ``all``, behind ``val/`` if it is one of validation; of a
            curve in the category of health all of the curve's name but its last part.
    """

    category: str
    chart: str
    line: str


def place(tag: str) -> Place | None:
    """Where :func:`dashboard_layout` draws a curve, whether or not its measure is registered here.

    Args:
        tag: Name of the curve.

    Returns:
        The place; ``None`` for the curve of another tool.

    Example:
        >>> place("val/collapse/encoder/effective_rank")
        Place(category='Collapse', chart='effective_rank', line='val/encoder')
        >>> place("collapse/encoder/n")
        Place(category='Health', chart='n', line='collapse/encoder')
    """
    families = "|".join(map(re.escape, _families()))
    if found := re.fullmatch(rf"({_PREFIX})({families})/(.+)/([^/]+)", tag):
        prefix, _, _, family, layer, name = found.groups(default="")
        if name in HEALTH:
            return Place(TRUST, name, tag.rpartition("/")[0])
        return Place(category(family), name, prefix + layer)
    if found := re.fullmatch(rf"({_PREFIX})({families})/([^/]+)", tag):
        prefix, _, _, family, name = found.groups(default="")
        if f"{family}/{name}" in CURVES:  # of the whole
            health = name in HEALTH
            return Place(TRUST if health else category(family), name, prefix + (family if health else "all"))
    one = "|".join(f"{family}/{names}" for family, names in _ONE_CHART.items())
    if found := re.fullmatch(rf"({_PREFIX})({one})", tag):
        prefix, _, _, name = found.groups(default="")
        family, _, name = name.partition("/")
        return Place(category(family), family, prefix + name)
    return None


def dashboard_layout(tags: Iterable[str] | None = None) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Charts for TensorBoard's "Custom Scalars" tab: one per registered measure and curve, with a line per layer.

    The tags of a chart are a regular expression that the TensorBoard server matches, so that it also has the layers
    that appear later. Curves of validation (``val/...``) share the chart of training: the gap between the two is what
    one looks for. The charts that say how far to trust the others (number of rows, share that is not finite, flag)
    stand by themselves, one each for all families.

    Args:
        tags: Curves that are drawn: only charts that have one of them are laid out. ``None`` for all that are known.

    Returns:
        ``{category: {chart: ("Multiline", [pattern])}}``, what ``SummaryWriter.add_custom_scalars`` takes.

    Example:
        >>> dashboard_layout(["collapse/encoder/effective_rank", "guard/complete_collapse"])["Collapse"]
        {'effective_rank': ('Multiline', ['(.*-)?(val/)?collapse/.+/effective_rank$'])}
    """
    layout = _every_chart()
    if tags is None:
        return layout
    drawn = {(at.category, at.chart) for at in map(place, tags) if at is not None}
    kept = {
        title: {name: chart for name, chart in charts.items() if (title, name) in drawn}
        for title, charts in layout.items()
    }
    return {title: charts for title, charts in kept.items() if charts}


def curve_facts() -> dict[tuple[str, str], list[str]]:
    """What the charts mean: what a curve reads, its range, what collapsed looks like, source; by category and chart."""
    facts = {(category(m.family), m.curve): [m.reads, m.range, m.collapsed, m.source] for m in MEASURES.values()}
    for curve in CURVES.values():
        chart = TRUST if curve.name in HEALTH else category(curve.family), curve.name
        facts.setdefault(chart, [curve.reads, curve.range, curve.collapsed, curve.source])
    return facts


def category(family: str) -> str:
    """Title of the category that shows the curves of a family."""
    return family.replace("_", " ").capitalize()


def _families() -> list[str]:
    return list(dict.fromkeys(["collapse", *(curve.family for curve in CURVES.values())]))


def _every_chart() -> dict[str, dict[str, tuple[str, list[str]]]]:
    categories: dict[str, dict[str, tuple[str, list[str]]]] = {"Collapse": {}}
    for measure in MEASURES.values():
        if measure.kind != "pairs":
            chart = _chart(f"{measure.family}/.+/{measure.curve}")
            categories.setdefault(category(measure.family), {})[measure.curve] = chart
    for curve in CURVES.values():
        if curve.name not in HEALTH:  # of every layer, or of the whole
            charts = categories.setdefault(category(curve.family), {})
            charts.setdefault(curve.name, _chart(f"{curve.family}/(.+/)?{curve.name}"))
    for family, names in _ONE_CHART.items():
        charts = categories.pop(category(family), {})
        categories[category(family)] = {family: _chart(f"{family}/{names}"), **charts}
    families = "|".join(map(re.escape, _families()))
    return categories | {TRUST: {name: _chart(f"({families})/(.+/)?{name}") for name in HEALTH}}


def _chart(pattern: str) -> tuple[str, list[str]]:
    return "Multiline", [f"{_PREFIX}{pattern}$"]
