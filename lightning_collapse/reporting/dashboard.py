"""The TensorBoard dashboard and the legend, both read from the tables of measures and curves."""

import shutil
from itertools import zip_longest
from textwrap import wrap

from lightning_collapse.utilities.registry import CURVES, MEASURES, Measure

_COLUMNS = ("measure", "reads", "range", "collapsed", "source")
_NARROWEST = 10
_HEALTH = ("n", "nonfinite_fraction", "flag")


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
    families: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for curve in CURVES.values():
        charts = families.setdefault(curve.family.replace("_", " ").capitalize(), {})
        charts[curve.name] = _chart(f"{curve.family}/(.+/)?{curve.name}")  # of every layer, or of the whole
    penalties = families.pop("Penalty", {})
    return {
        "Collapse": {name: _chart(f"collapse/.+/{name}") for name in (*measures, *_HEALTH)},
        **families,
        "Regularizer": {"regularizer": _chart("regularizer/.+")},
        "Penalty": {"penalty": _chart("penalty/[^/]+"), **penalties},
        "Guard": {"guard": _chart("guard/.+")},
    }


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


def _chart(pattern: str) -> tuple[str, list[str]]:
    # the server anchors a pattern at the front only; `TensorBoardLogger(prefix=...)` puts "prefix-" there
    return "Multiline", [f"(.*-)?(val/)?{pattern}$"]


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
