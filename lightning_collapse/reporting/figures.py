"""Figures of the report page: a picture, its key, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10, nan

import numpy as np

from lightning_collapse.reporting.events import Histograms
from lightning_collapse.reporting.labels import labels
from lightning_collapse.reporting.run_view import Curve, evenly
from lightning_collapse.reporting.spectrum import LOG10_EDGES
from lightning_collapse.reporting.svg import (
    COLORS,
    Line,
    Marks,
    color_bar,
    line_plot,
    number,
    raster,
    text,
    thin,
    value_range,
)

_COLUMNS, _ROWS = 96, 32  # of a raster
_NUMBERS = 12  # rows of a table of numbers


def limits_of(curves: Sequence[Curve]) -> tuple[float, float, bool]:
    """The axis on which all curves can be compared."""
    return value_range([Line("", list(curve), list(curve.values()), "") for curve in curves])


def curves_figure(
    title: str,
    subtitle: str,
    curves: Mapping[str, Curve],
    limits: tuple[float, float, bool],
    span: tuple[int, int],
    marks: Marks = (),
    nulls: Mapping[str, Curve] | None = None,
    most: int = 500,
    colors: Mapping[str, int] | None = None,
) -> str:
    """Curves over steps; of more than eight, eight from the first to the last.

    Args:
        title: What they show.
        subtitle: Of which run.
        curves: The curves by name.
        limits: Of the values, as :func:`limits_of` tells.
        span: First and last step of the axis.
        marks: Steps to mark, each with its word.
        nulls: What noise would read, by the name of the curve.
        most: Points per curve.
        colors: Number of the color of every curve, where charts share colors; else by order.
    """
    names = evenly(list(curves), COLORS)
    label = labels(names)
    styles = {name: f"c{(colors or {}).get(name, i) % COLORS}" for i, name in enumerate(names)}
    lines = [Line(name, *thin(*_columns(curves[name]), most), styles[name]) for name in names]
    noise = [Line(f"{n}, noise", *thin(*_columns(of), most), "null") for n, of in _different(nulls or {}).items() if of]
    keys = [(line.style, label[line.name]) for line in lines] + ([("null", "what noise reads")] if noise else [])
    left_out = f"{len(names)} of {len(curves)} layers are drawn." if len(names) < len(curves) else ""
    steps = evenly(sorted({step for name in names for step in curves[name]}), _NUMBERS)
    rows = [[str(step), *(_cell(curves[name], step) for name in names)] for step in steps]
    svg = line_plot(f"{title}, {subtitle}: {', '.join(names)}", [*noise, *lines], span, limits, marks)
    table = table_of(["step", *(label[name] for name in names)], rows)
    return _figure(title, subtitle, svg, _keys([*keys, *_mark_keys(marks)]), left_out, table)


def sparkline(name: str, curve: Curve, null: Curve, span: tuple[int, int], marks: Marks = (), most: int = 500) -> str:
    """One curve in a small picture, with its key.

    Args:
        name: What it shows.
        curve: The curve.
        null: What noise would read; empty where that is not known.
        span: First and last step of the axis.
        marks: Steps to mark, each with its word.
        most: Points of the curve.
    """
    lines = [Line(name, *thin(*_columns(curve), most), "c0")]
    lines += [Line("what noise reads", *thin(*_columns(null), most), "null")] if null else []
    svg = line_plot(name, lines, span, limits_of([curve, null]), marks, height=110)
    keys = [("c0", name), *([("null", "what noise reads")] if null else []), *_mark_keys(marks)]
    return f"<figure class=spark>{svg}{_keys(keys)}</figure>"


def layers_figure(
    title: str,
    subtitle: str,
    curves: Mapping[str, Curve],
    nulls: Mapping[str, Curve],
    limits: tuple[float, float, bool],
    marks: Marks = (),
) -> str:
    """Layer by step, as shares of what noise reads where that is known of every layer, else between ``limits``."""
    names = evenly(list(curves), _ROWS)
    shares = all(nulls.get(name) for name in names)
    steps = evenly(sorted({step for name in names for step in curves[name]}), _COLUMNS)
    low, high, logarithmic = (0.0, 1.0, False) if shares else limits

    def value(name: str, step: int) -> float:
        reading = curves[name].get(step, nan)
        if shares:
            return reading / nulls[name].get(step, nan)
        return (log10(reading) if reading > 0 else nan) if logarithmic else reading

    ends = (log10(low), log10(high)) if logarithmic else (low, high)
    table = [[value(name, step) for step in steps] for name in names]
    label = labels(names)
    shown_as = [label[name] for name in names]
    svg = raster(f"{title} by layer and step, {subtitle}", shown_as, steps, table, ends, marks)
    shown = evenly(steps, 6)
    rows = [[text(label[name]), *(_cell(curves[name], step) for step in shown)] for name in names]
    kind = ", share of what noise reads" if shares else ", logarithmic" if logarithmic else ""
    left_out = f" {len(names)} of {len(curves)} layers are drawn." if len(names) < len(curves) else ""
    note = f"{number(low)} {_bar()} {number(high)}{kind}; a column per point.{left_out}"
    return _figure("", subtitle, svg, _keys(_mark_keys(marks)), note, table_of(["layer", *map(str, shown)], rows))


def spectrum_figure(layer: str, subtitle: str, histograms: Histograms, marks: Marks = ()) -> str:
    """How the standard deviations along the principal axes of a layer are spread, over steps."""
    steps = evenly(list(histograms), _COLUMNS)
    edges = np.array(LOG10_EDGES)
    counts = np.zeros((len(edges) - 1, len(steps)))
    for column, step in enumerate(steps):
        right, weights = (np.asarray(part, dtype=float) for part in histograms[step])
        inside = np.clip(np.searchsorted(edges, right - 1e-6) - 1, 0, len(edges) - 2)
        np.add.at(counts[:, column], inside, weights / max(weights.sum(), 1e-300))
    filled = np.flatnonzero(counts.sum(axis=1)) if counts.any() else np.array([0, len(edges) - 2])
    first, last = int(filled[0]), int(filled[-1])
    bins = list(range(last, first - 1, -1))  # large on top
    top = float(counts.max())
    svg = raster(
        f"Standard deviations along the principal axes of {layer} over steps, {subtitle}",
        [f"1e{edges[i]:g}" if edges[i] % 1 == 0 else "" for i in bins],
        steps,
        counts[bins],
        (0.0, top or 1.0),
        marks,
        numeric=True,
    )
    shown = evenly(steps, 6)
    rows = [
        [f"1e{edges[i]:g} to 1e{edges[i + 1]:g}", *(f"{100 * counts[i, steps.index(step)]:.3g} %" for step in shown)]
        for i in bins
    ]
    note = f"0 {_bar()} {100 * top:.0f} % of the axes in a quarter of a decade"
    return _figure(
        layer, subtitle, svg, _keys(_mark_keys(marks)), note, table_of(["deviation", *map(str, shown)], rows)
    )


def _figure(title: str, subtitle: str, svg: str, keys: str, note: str, table: str) -> str:
    head = f"<b>{text(title)}</b> <span class=soft>{text(subtitle)}</span>" if title or subtitle else ""
    return (
        f"<figure>{head}{svg}{keys}"
        f"<figcaption>{note}</figcaption><details><summary>Numbers</summary>{table}</details></figure>\n"
    )


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """A table whose rows fold into lists where it would not fit: every cell knows the name of its column.

    Args:
        head: Names of the columns.
        rows: Cells, which are HTML.
        words: Whether the cells are sentences and not numbers.
    """
    room = next((size for size in (4, 6, 9) if len(head) <= size), 99)
    cells = "".join(f"<th>{text(cell)}</th>" for cell in head)
    names = [text(cell) for cell in head]
    lines = ("".join(f'<td data-of="{n}">{cell}</td>' for n, cell in zip(names, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    style = f"w{room} words" if words else f"w{room}"
    return f'<div class=fits><table class="{style}"><tr>{cells}</tr>{body}</table></div>'


def _keys(keys: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li class="{style}"><i></i>{text(name)}</li>' for style, name in keys)
    return f"<ul class=keys>{items}</ul>" if keys else ""


def _mark_keys(marks: Marks) -> list[tuple[str, str]]:
    """What dashed lines stand for; of many only what kind of step they mark."""
    words = [word for _, word in marks] if len(marks) <= 2 else ["since when a layer is judged so, see the verdicts"]
    return [("mark", word) for word in words]


def _different(nulls: Mapping[str, Curve]) -> dict[str, Curve]:
    """Layers of one width have one null."""
    kept: dict[tuple[float, ...], str] = {}
    for name, curve in nulls.items():
        kept.setdefault(tuple(curve.values()), name)
    return {name: nulls[name] for name in kept.values()}


def _bar() -> str:
    return f'<img class=bar alt="dark to bright" src="{color_bar()}">'


def _cell(curve: Curve, step: int) -> str:
    return text(number(curve[step])) if step in curve else ""


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())
