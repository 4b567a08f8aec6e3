"""TensorBoard dashboard: which chart draws which curve, read from the tables of measures and curves."""

import re
from typing import NamedTuple

from lightning_collapse.utilities.registry import CURVES, MEASURES

_HEALTH = ("n", "nonfinite_fraction", "flag")
_ONE_CHART = {"regularizer": ".+", "penalty": "[^/]+", "guard": ".+"}
# the server anchors a pattern at the front only; `TensorBoardLogger(prefix=...)` puts "prefix-" there
_PREFIX = "(.*-)?(val/)?"


class Place(NamedTuple):
    """Where the dashboard draws a curve.

    Attributes:
        category: Title of the category, such as ``"Neural collapse"``.
        chart: Name of the chart in it: that of the measure.
        line: Name of the line in the chart: the layer, or ``all``, behind ``val/`` if it is one of validation.
        health: Whether the chart says how far to trust the others.
    """

    category: str
    chart: str
    line: str
    health: bool = False


def place(tag: str) -> Place | None:
    """Where :func:`dashboard_layout` draws a curve, whether or not its measure is registered here.

    Args:
        tag: Name of the curve.

    Returns:
        The place; ``None`` for the curve of another tool.

    Example:
        >>> place("val/collapse/encoder/effective_rank")
        Place(category='Collapse', chart='effective_rank', line='val/encoder', health=False)
    """
    families = "|".join(map(re.escape, dict.fromkeys(["collapse", *(curve.family for curve in CURVES.values())])))
    if found := re.fullmatch(rf"({_PREFIX})({families})/(.+)/([^/]+)", tag):
        prefix, _, _, family, layer, name = found.groups(default="")
        return Place(category(family), name, prefix + layer, name in _HEALTH)
    if found := re.fullmatch(rf"({_PREFIX})({families})/([^/]+)", tag):
        prefix, _, _, family, name = found.groups(default="")
        if f"{family}/{name}" in CURVES:  # of the whole
            return Place(category(family), name, prefix + "all", name in _HEALTH)
    one = "|".join(f"{family}/{names}" for family, names in _ONE_CHART.items())
    if found := re.fullmatch(rf"({_PREFIX})({one})", tag):
        prefix, _, _, name = found.groups(default="")
        family, _, name = name.partition("/")
        return Place(category(family), family, prefix + name)
    return None


def dashboard_layout() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Charts for TensorBoard's "Custom Scalars" tab: one per registered measure and curve, with a line per layer.

    The tags are regular expressions that the TensorBoard server matches, so one call at the start of a run also covers
    curves that appear later. Curves of validation (``val/...``) share the chart of training: the gap between the two
    is what one looks for.

    Returns:
        ``{category: {chart: ("Multiline", [pattern])}}``, what ``SummaryWriter.add_custom_scalars`` takes.

    Example:
        >>> dashboard_layout()["Collapse"]["flag"]
        ('Multiline', ['(.*-)?(val/)?collapse/.+/flag$'])
    """
    measures = [measure.curve for measure in MEASURES.values() if measure.kind != "pairs"]
    families = {"Collapse": {name: _chart(f"collapse/.+/{name}") for name in (*measures, *_HEALTH)}}
    for curve in CURVES.values():
        charts = families.setdefault(category(curve.family), {})
        charts.setdefault(curve.name, _chart(f"{curve.family}/(.+/)?{curve.name}"))  # of every layer, or of the whole
    for family, names in _ONE_CHART.items():
        charts = families.pop(category(family), {})
        families[category(family)] = {family: _chart(f"{family}/{names}"), **charts}
    return families


def curve_facts() -> dict[tuple[str, str], list[str]]:
    """What the charts mean: what a curve reads, its range, what collapsed looks like, source; by category and chart."""
    measures = {("Collapse", m.curve): [m.reads, m.range, m.collapsed, m.source] for m in MEASURES.values()}
    curves = {(category(c.family), c.name): [c.reads, c.range, c.collapsed, c.source] for c in CURVES.values()}
    return measures | curves


def category(family: str) -> str:
    """Title of the category that shows the curves of a family."""
    return family.replace("_", " ").capitalize()


def _chart(pattern: str) -> tuple[str, list[str]]:
    return "Multiline", [f"{_PREFIX}{pattern}$"]
