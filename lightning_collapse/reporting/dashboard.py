"""TensorBoard dashboard and legend, both read from the tables of measures and curves."""

import re
import shutil
from itertools import zip_longest
from textwrap import wrap
from typing import NamedTuple

from lightning_collapse.utilities.registry import CURVES, MEASURES, Measure

_COLUMNS = ("measure", "reads", "range", "collapsed", "source")
_NARROWEST = 10
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
    measures = {("Collapse", m.curve): [_reads(m), m.range, m.collapsed, m.source] for m in MEASURES.values()}
    curves = {(category(c.family), c.name): [c.reads, c.range, c.collapsed, c.source] for c in CURVES.values()}
    return measures | curves


def legend() -> str:
    """What every registered measure and curve means, as a Markdown table."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in _rows()]
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *([f"`{name}`", *facts] for name, *facts in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def legend_for_terminal(width: int | None = None) -> str:
    """The table of :func:`legend` for a terminal: aligned columns, cells wrapped to ``width`` characters.

    Args:
        width: Characters per line; ``None`` asks the terminal. Columns do not shrink below a readable minimum.
    """
    rows = [list(_COLUMNS), *_rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    budget = (width or shutil.get_terminal_size().columns) - 2 * (len(widths) - 1)
    while sum(widths) > budget and max(widths[1:]) > _NARROWEST:
        widths[widths.index(max(widths[1:]), 1)] -= 1  # names stay whole: they are there to be copied
    return "\n".join(line for row in rows for line in _wrapped(row, widths))


def category(family: str) -> str:
    """Title of the category that shows the curves of a family."""
    return family.replace("_", " ").capitalize()


def _chart(pattern: str) -> tuple[str, list[str]]:
    return "Multiline", [f"{_PREFIX}{pattern}$"]


def _rows() -> list[list[str]]:
    facts = [
        *((m.name, _reads(m), m.range, m.collapsed, m.source) for m in MEASURES.values()),
        *((key, c.reads, c.range, c.collapsed, c.source) for key, c in CURVES.items()),
    ]
    return [[" ".join(fact.split()) for fact in row] for row in facts]


def _reads(measure: Measure) -> str:
    return f"{measure.spectrum} spectrum" if measure.kind == "spectrum" else measure.kind


def _wrapped(row: list[str], widths: list[int]) -> list[str]:
    cells = [wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
    lines = zip_longest(*cells, fillvalue="")
    return ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
