"""Report page: what monitors and guards have written about any number of runs, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path

from lightning_collapse.reporting.dashboard import TRUST, curve_facts
from lightning_collapse.reporting.events import read_runs
from lightning_collapse.reporting.figures import curves_figure, layers_figure, limits_of, spectrum_figure, table_of
from lightning_collapse.reporting.labels import labels
from lightning_collapse.reporting.page_style import STYLE
from lightning_collapse.reporting.run_view import Board, Curve, evenly
from lightning_collapse.reporting.svg import COLORS, Marks, number, text
from lightning_collapse.reporting.verdict_cards import marks_of, read_by, run_card, verdict_cards
from lightning_collapse.rules import RULES

POINTS = 500
"""Most points of a curve that are drawn."""
_RUNS, _CHARTS, _SPECTRA, _LAYERS = 8, 48, 12, 64  # most of these are drawn, the last two of each run
_BUDGET = 150_000  # points on the page


def report(logdir: str | Path, out: str | Path = "collapse.html") -> Path:
    """Write a page about the runs under a folder of TensorBoard event files: verdicts, evidence, curves and spectra.

    The page needs no network and no script. A curve is drawn with at most 500 points, of which the lowest, the highest
    and any missing number of every stretch stay; with many curves it is fewer, down to 60. Of more than eight runs
    eight are drawn, and of each at most 48 charts, twelve verdicts and twelve spectra; the page says what it leaves
    out, and stays below some 20 MB however much was logged. Equal events give equal bytes.

    Args:
        logdir: The folder, as ``tensorboard --logdir`` takes it.
        out: Where to write the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there is no such folder, no event file under it, or no curve of this package in any.

    Example::

        report("lightning_logs", "collapse.html")
    """
    boards = [Board.of(run) for run in read_runs(logdir)]
    known = [board for board in boards if board.charts]
    if not known:
        raise ValueError(
            f"`logdir` must hold the events of a run with a monitor, got {str(logdir)!r}: none of {len(boards)} runs"
            " has a curve of this package. Train with `CollapseMonitor()` and `TensorBoardLogger`."
        )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(evenly(known, _RUNS), len(known), len(boards)), encoding="utf-8")
    return path


def _page(boards: Sequence[Board], known: int, found: int) -> str:
    drawn = sum(
        min(len(lines), COLORS) for board in boards for charts in board.charts.values() for lines in charts.values()
    )
    most = max(60, min(POINTS, _BUDGET // max(drawn, 1)))
    sections = {
        "Runs": _overview(boards),
        "Verdicts": _verdicts(boards, most),
        "Loss": _losses(boards, most),
        "Final values": _final_values(boards),
        **_categories(boards, most),
        "Spectra": _spectra(boards),
        "How to read it": _legend(boards, most),
    }
    sections = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#s{i}">{text(title)}</a>' for i, title in enumerate(sections))
    bodies = "".join(
        f'<section id="s{i}"><h2>{text(title)}</h2>\n{body}</section>\n'
        for i, (title, body) in enumerate(sections.items())
    )
    count = sum(len(board.findings) for board in boards)
    said = f"{count} verdict{'s' if count != 1 else ''} in {len(boards)} run{'s' if len(boards) != 1 else ''}"
    others = f" {len(boards)} of {known} runs are shown." if known > len(boards) else ""
    others += f" {found - known} without a curve of this package are not shown." if found > known else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Representation collapse: {said}</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>Representation collapse</h1><p class=soft>{said}.{others}</p><nav>{links}</nav></header>\n"
        f"<main>{bodies}</main></body></html>\n"
    )


def _overview(boards: Sequence[Board]) -> str:
    return f'<div class="grid wide">{"".join(run_card(board) for board in boards)}</div>'


def _verdicts(boards: Sequence[Board], most: int) -> str:
    return "".join(verdict_cards(board, most) for board in boards)


def _final_values(boards: Sequence[Board]) -> str:
    """Last values, with their nulls, of the measures that rules read."""
    read: dict[str, list[str]] = {}
    for rule in RULES.values():
        for category, chart in read_by(rule):
            read.setdefault(category, []).append(chart)
    tables = ""
    for board in boards:
        for category, charts in board.charts.items():
            if names := [name for name in charts if name in read.get(category, ())]:
                tables += f"<div class=card>{_final(board, category, names)}</div>"
    return tables


def _final(board: Board, category: str, charts: Sequence[str]) -> str:
    lines = list(dict.fromkeys(line for chart in charts for line in board.charts[category][chart]))
    label = labels(lines)
    rows = []
    for line in lines[:_LAYERS]:
        cells = [f"<span class=name>{text(label[line])}</span>"]
        for chart in charts:
            value, null = board.last(category, chart, line)
            beside = f" <span class=soft>of {number(null)}</span>" if isfinite(null) else ""
            cells.append(f"{number(value)}{beside}" if line in board.charts[category][chart] else "")
        rows.append(cells)
    more = f"<p class=soft>The first {_LAYERS} of {len(lines)} layers.</p>" if len(lines) > _LAYERS else ""
    table = table_of(["layer", *(chart.replace("_", " ") for chart in charts)], rows)
    head = f"<b>{text(category)}</b> <span class=soft>{text(board.run.name)}</span>"
    return f"{head}{table}{more}"


def _losses(boards: Sequence[Board], most: int) -> str:
    """A chart per run, or of several runs one per name."""
    if len(boards) == 1:
        curves = {tag: boards[0].losses[tag] for tag in list(boards[0].losses)[:COLORS]}
        figures = [_compared("", curves, boards, most)] if curves else []
    else:
        tags = list(dict.fromkeys(chain.from_iterable(board.losses for board in boards)))[:COLORS]
        figures = [
            _compared(tag, _by_run((board, board.losses.get(tag, {})) for board in boards), boards, most)
            for tag in tags
        ]
    return f"<div class=grid>{''.join(figures)}</div>" if figures else ""


def _categories(boards: Sequence[Board], most: int) -> dict[str, str]:
    """A section per category of the dashboard; the charts that say how far to trust the others are folded."""
    left = _CHARTS
    sections = {}
    for category in dict.fromkeys(chain.from_iterable(board.charts for board in boards)):
        charts = list(dict.fromkeys(chain.from_iterable(board.charts.get(category, {}) for board in boards)))
        shown, left = charts[:left], max(left - len(charts), 0)
        drawn = "".join(_chart(boards, category, chart, most) for chart in shown)
        if len(boards) == 1:
            drawn = f"<div class=grid>{drawn}</div>"
        if category == TRUST:
            drawn = f"<details><summary>How far to trust the others</summary>{drawn}</details>"
        if len(shown) < len(charts):
            drawn += f"<p class=soft>{len(shown)} of {len(charts)} charts are drawn.</p>"
        sections[category] = drawn
    return sections


def _chart(boards: Sequence[Board], category: str, chart: str, most: int) -> str:
    """The curves of a measure, and below them the same by layer.

    Of one run all layers are in one chart; of several runs a chart per layer compares them.
    """
    having = [board for board in boards if chart in board.charts.get(category, {})]
    shown = ((board, line, curve) for board in having for line, curve in board.charts[category][chart].items())
    limits = limits_of([part for board, line, curve in shown for part in (curve, board.null(category, chart, line))])
    by_layer = ""
    for board in having:
        curves = board.charts[category][chart]
        if len(curves) > 1 and category not in ("Guard", "Regularizer", TRUST):
            nulls = {line: board.null(category, chart, line) for line in curves}
            name = board.run.name if len(boards) > 1 else ""
            picture = layers_figure(chart, name, curves, nulls, limits, marks_of(board, category))
            by_layer += picture if len(boards) == 1 else f"<div class=cell>{picture}</div>"
    if len(boards) == 1:
        [board] = having
        curves, span = board.charts[category][chart], (0, board.run.last_step)
        nulls = {line: board.null(category, chart, line) for line in curves}
        drawn = curves_figure(chart, board.run.name, curves, limits, span, marks_of(board, category), nulls, most)
        return f"<div class=cell>{drawn}{by_layer}</div>"
    lines = list(dict.fromkeys(chain.from_iterable(board.charts[category][chart] for board in having)))
    label, cells = labels(lines), ""
    for line in evenly(lines, COLORS):
        curves = _by_run((board, board.charts[category][chart].get(line, {})) for board in having)
        nulls = _by_run((board, board.null(category, chart, line)) for board in having)
        marks = [
            (step, f"{board.run.name}: {word}") for board in having for step, word in marks_of(board, category, line)
        ]
        cells += _compared(label[line], curves, boards, most, limits, marks, nulls)
    some = f"<p class=soft>{COLORS} of {len(lines)} layers are drawn.</p>" if len(lines) > COLORS else ""
    return f"<h3>{text(chart)}</h3><div class=grid>{cells}{by_layer}</div>{some}"


def _compared(
    title: str,
    curves: Mapping[str, Curve],
    boards: Sequence[Board],
    most: int,
    limits: tuple[float, float, bool] | None = None,
    marks: Marks = (),
    nulls: Mapping[str, Curve] | None = None,
) -> str:
    """A chart with a line per run; a run has one color on the whole page."""
    colors = {board.run.name: i for i, board in enumerate(boards)} if len(boards) > 1 else None
    span = (0, max(board.run.last_step for board in boards))
    shown = limits_of(list(curves.values())) if limits is None else limits
    name = "" if len(boards) > 1 else boards[0].run.name
    return f"<div class=cell>{curves_figure(title, name, curves, shown, span, marks, nulls, most, colors)}</div>"


def _by_run(curves: Iterable[tuple[Board, Curve]]) -> dict[str, Curve]:
    return {board.run.name: curve for board, curve in curves if curve}


def _spectra(boards: Sequence[Board]) -> str:
    intro = (
        "<p class=soft>Collapse shows as mass that wanders down, dimensional collapse as a part that splits off"
        " downwards.</p>"
    )
    figures = [
        f"<div class=cell>{spectrum_figure(layer, board.run.name, board.spectra[layer], marks)}</div>"
        for board in boards
        for layer in evenly(list(board.spectra), _SPECTRA)
        for marks in [marks_of(board, "Collapse", layer)]
    ]
    return f"{intro}<div class=grid>{''.join(figures)}</div>" if figures else ""


def _legend(boards: Sequence[Board], most: int) -> str:
    """What every chart on the page means, and what was left out."""
    shown = {(category, chart) for board in boards for category, charts in board.charts.items() for chart in charts}
    rows = [
        [f"<span class=name>{text(chart)}</span>", *(text(fact) for fact in facts)]
        for (category, chart), facts in curve_facts().items()
        if (category, chart) in shown
    ]
    return (
        "<p>Compare a rank with what isotropic noise of the same size reads, not with the width of the layer:"
        " <span class=soft>of</span> in the tables, dotted in the plots. Dashed is the step since when a layer is so"
        " judged, and in the evidence also the step at which it was said.</p><p>A curve is drawn with at most"
        f" {most} points, of which the extremes and missing numbers stay; a tick on the floor of a plot, and grey in a"
        " picture, is a value that was no number.</p>"
        f"{table_of(['measure', 'reads', 'range', 'collapsed', 'source'], rows, words=True)}"
    )
