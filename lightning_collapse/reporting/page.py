"""Report page: what monitors and guards have written about any number of runs, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from math import isfinite
from pathlib import Path

from lightning_collapse.reporting.dashboard import category as category_of
from lightning_collapse.reporting.dashboard import curve_facts
from lightning_collapse.reporting.events import read_runs
from lightning_collapse.reporting.figures import curves_figure, layers_figure, limits_of, spectrum_figure
from lightning_collapse.reporting.page_style import STYLE
from lightning_collapse.reporting.run_view import Board, evenly
from lightning_collapse.reporting.svg import COLORS, number, text, time_line
from lightning_collapse.reporting.verdicts import Finding
from lightning_collapse.rules import ALL, RULES, Task

POINTS = 500
"""Most points of a curve that are drawn."""
_RUNS, _CHARTS, _VERDICTS, _SPECTRA = 8, 48, 12, 12  # most of these are drawn, the last three of each run
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
    return f'<div class="grid wide">{"".join(_run(board) for board in boards)}</div>'


def _run(board: Board) -> str:
    run = board.run
    seconds = run.ended - run.began
    facts = {
        "last step": str(run.last_step),
        "curves": str(sum(len(lines) for charts in board.charts.values() for lines in charts.values())),
        "layers": str(len(board.layers)),
        "duration": str(timedelta(seconds=round(seconds))) if isfinite(seconds) else "unknown",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    kinds = list(dict.fromkeys(f.kind for f in board.findings))
    badges = "".join(
        f'<span class="badge {_style(kind, "good")}">{text(kind.replace("_", " "))}</span>' for kind in kinds
    )
    if not kinds:
        judged = "Guard" in board.charts
        badges = f'<span class="badge good">{"no verdict" if judged else "not judged: no CollapseGuard"}</span>'
    tables = "".join(_final(board, category, chart) for category, chart in _read_by_rules(board).items())
    style = "bad" if any(_style(kind, "") == "" for kind in kinds) else "news"
    head = f"<h3 class=name>{text(run.name)}</h3>{badges}<dl>{items}</dl>"
    return f'<article class="card {style}">{head}{tables}</article>\n'


def _read_by_rules(board: Board) -> dict[str, list[str]]:
    """The measures that rules read, where the run has them, by category."""
    read: dict[str, list[str]] = {}
    for rule in RULES.values():
        category = category_of(rule.family)
        read.setdefault(category, []).extend([*rule.measures, *rule.optional])
    return {
        category: [name for name in charts if name in read.get(category, ())]
        for category, charts in board.charts.items()
        if set(charts) & set(read.get(category, ()))
    }


def _final(board: Board, category: str, charts: Sequence[str]) -> str:
    """Last values with their nulls."""
    lines = list(dict.fromkeys(line for chart in charts for line in board.charts[category][chart]))
    rows = ""
    for line in lines[:64]:
        cells = ""
        for chart in charts:
            value, null = board.last(category, chart, line)
            beside = f" <span class=soft>of {number(null)}</span>" if isfinite(null) else ""
            cells += f"<td>{number(value) if line in board.charts[category][chart] else ''}{beside}</td>"
        rows += f"<tr><td class=name>{text(line)}</td>{cells}</tr>"
    head = "".join(f"<th>{text(chart.replace('_', ' '))}</th>" for chart in charts)
    more = f"<p class=soft>The first 64 of {len(lines)} layers.</p>" if len(lines) > 64 else ""
    table = f"<div class=scroll tabindex=0><table><tr><th>layer</th>{head}</tr>{rows}</table></div>{more}"
    title = f"Final values, {text(category.lower())}"
    return f"<details{' open' if len(lines) <= 12 else ''}><summary>{title}</summary>{table}</details>"


def _verdicts(boards: Sequence[Board], most: int) -> str:
    parts = []
    for board in (board for board in boards if board.findings):
        bars = [
            (_where(finding), _style(finding.kind, "news") or "bad", finding.since, finding.until, finding.step)
            for finding in board.findings[:40]
        ]
        said = "; ".join(f"{_where(f)} since step {f.since}, said at step {f.step}" for f in board.findings[:40])
        picture = time_line(f"Verdicts over steps: {said}", bars, board.run.last_step)
        note = "From the step since when to the end of the verdict; the dot is the step at which it was said."
        parts.append(
            f"<figure class=card><b>When</b> <span class=soft>{text(board.run.name)}</span>{picture}"
            f"<figcaption>{note}</figcaption></figure>\n"
        )
        parts += [_verdict(board, finding, most) for finding in board.findings[:_VERDICTS]]
        if len(board.findings) > _VERDICTS:
            parts.append(
                f"<p class=soft>The first {_VERDICTS} of {len(board.findings)} verdicts with their evidence.</p>"
            )
    if not parts and any("Guard" in board.charts for board in boards):
        return "<p>The guard was there and said nothing.</p>"
    return "".join(parts)


def _verdict(board: Board, finding: Finding, most: int) -> str:
    rule = RULES.get(finding.kind)
    where = f" in <code>{text(finding.layer)}</code>" if finding.layer else ""
    words = [f"<p><b>{text(finding.says)}</b></p>"] if finding.says else []
    words += [f"<p>{text(finding.told[:1].upper() + finding.told[1:])}.</p>"] if finding.told else []
    if not finding.layer:
        words.append(
            '<p>Only the number of layers was logged; <code>CollapseGuard(action="log")</code> also names them.</p>'
        )
    if advice := getattr(rule, "advice", ""):
        words.append(f"<p><b>What helps:</b> {text(advice)}</p>")
    if paper := getattr(rule, "paper", ""):
        words.append(f"<p class=soft>{text(paper)}</p>")
    figures = []
    if rule is not None:
        category = category_of(rule.family)
        charts = board.charts.get(category, {})
        for measure in (*rule.measures, *rule.optional):
            lines = charts.get(measure, {})
            names = [finding.layer, *([ALL] if rule.applies_to(ALL, Task()) else [])] if finding.layer else list(lines)
            curves = {name: lines[name] for name in names if name in lines}
            nulls = {name: board.null(category, measure, name) for name in curves}
            if curves:
                marks = [(finding.since, f"since step {finding.since}"), (finding.step, f"said at step {finding.step}")]
                limits, span = limits_of([*curves.values(), *nulls.values()]), (0, board.run.last_step)
                figures.append(curves_figure(measure, "", curves, limits, span, marks, nulls, most))
    since = f"since step {finding.since}, said at step {finding.step}" if finding.layer else f"at step {finding.step}"
    title = f"{text(str(finding).capitalize())}{where}"
    return (
        f'<article class="card {_style(finding.kind, "news") or "bad"}"><h3>{title}</h3>'
        f"<p class=soft>{text(board.run.name)}, {since}</p>{''.join(words)}"
        f"<div class=grid>{''.join(figures)}</div></article>\n"
    )


def _losses(boards: Sequence[Board], most: int) -> str:
    figures = []
    for board in (board for board in boards if board.losses):
        curves = {tag: board.losses[tag] for tag in list(board.losses)[:COLORS]}
        span = (0, board.run.last_step)
        limits = limits_of(list(curves.values()))
        figures.append(f"<div class=cell>{curves_figure('', board.run.name, curves, limits, span, most=most)}</div>")
    return f"<div class=grid>{''.join(figures)}</div>" if figures else ""


def _categories(boards: Sequence[Board], most: int) -> dict[str, str]:
    """A section per category of the dashboard; the charts that say how far to trust the others stand folded below."""
    left = _CHARTS
    sections = {}
    for category in dict.fromkeys(chain.from_iterable(board.charts for board in boards)):
        charts = list(dict.fromkeys(chain.from_iterable(board.charts.get(category, {}) for board in boards)))
        health = {chart for board in boards for name, chart in board.health if name == category}
        shown, left = charts[:left], max(left - len(charts), 0)
        sections[category] = _grid([_chart(boards, category, chart, most) for chart in shown if chart not in health])
        if folded := _grid([_chart(boards, category, chart, most) for chart in shown if chart in health]):
            sections[category] += f"<details><summary>How far to trust these</summary>{folded}</details>"
        if len(shown) < len(charts):
            sections[category] += f"<p class=soft>{len(shown)} of {len(charts)} charts are drawn.</p>"
    return sections


def _grid(charts: Sequence[Sequence[str]]) -> str:
    """Charts of one run side by side; of several runs, the runs side by side and the charts below each other."""
    if any(len(chart) > 1 for chart in charts):
        return "".join(f'<div class="grid wide">{"".join(chart)}</div>' for chart in charts)
    return f"<div class=grid>{''.join(cell for chart in charts for cell in chart)}</div>" if charts else ""


def _chart(boards: Sequence[Board], category: str, chart: str, most: int) -> list[str]:
    """The curves of a measure, and below them the same by layer: a cell per run, all with one axis."""
    having = [board for board in boards if chart in board.charts.get(category, {})]
    limits = limits_of([curve for board in having for curve in board.charts[category][chart].values()])
    cells = []
    for board in having:
        curves, marks, name = board.charts[category][chart], _marks(board, category), board.run.name
        figures = curves_figure(chart, name, curves, limits, (0, board.run.last_step), marks, most=most)
        if len(curves) > 1 and category not in ("Guard", "Regularizer") and (category, chart) not in board.health:
            nulls = {line: board.null(category, chart, line) for line in curves}
            figures += layers_figure(chart, name, curves, nulls, limits, marks)
        cells.append(f"<div class=cell>{figures}</div>")
    return cells


def _spectra(boards: Sequence[Board]) -> str:
    intro = (
        "<p class=soft>Collapse shows as mass that wanders down, dimensional collapse as a part that splits off"
        " downwards.</p>"
    )
    figures = [
        f"<div class=cell>{spectrum_figure(layer, board.run.name, board.spectra[layer], marks)}</div>"
        for board in boards
        for layer in evenly(list(board.spectra), _SPECTRA)
        for marks in [_marks(board, "Collapse", layer)]
    ]
    return f"{intro}<div class=grid>{''.join(figures)}</div>" if figures else ""


def _legend(boards: Sequence[Board], most: int) -> str:
    """What every chart on the page means, and what was left out."""
    shown = {(category, chart) for board in boards for category, charts in board.charts.items() for chart in charts}
    rows = "".join(
        f"<tr><td class=name>{text(chart)}</td>{''.join(f'<td>{text(fact)}</td>' for fact in facts)}</tr>"
        for (category, chart), facts in curve_facts().items()
        if (category, chart) in shown
    )
    head = "".join(f"<th>{name}</th>" for name in ("measure", "reads", "range", "collapsed", "source"))
    return (
        "<p>Compare a rank with what isotropic noise of the same size reads, not with the width of the layer:"
        " <span class=soft>of</span> in the tables, dotted in the plots. Dashed is the step since when a layer is so"
        " judged, and in the evidence also the step at which it was said.</p><p>A curve is drawn with at most"
        f" {most} points, of which the extremes and missing numbers stay; a tick on the floor of a plot, and grey in a"
        " picture, is a value that was no number.</p>"
        f"<div class=scroll tabindex=0><table class=words><tr>{head}</tr>{rows}</table></div>"
    )


def _marks(board: Board, category: str, layer: str | None = None) -> list[tuple[int, str]]:
    """Since when layers were judged by a curve of this category."""
    marks: dict[int, str] = {}
    for finding in board.findings:
        rule = RULES.get(finding.kind)
        if rule is not None and category_of(rule.family) == category and layer in (None, finding.layer):
            words = f"{_where(finding)} since step {finding.since}"
            marks[finding.since] = f"{marks[finding.since]}; {words}" if finding.since in marks else words
    return list(marks.items())[:8]


def _where(finding: Finding) -> str:
    return f"{finding} in {finding.layer}" if finding.layer else str(finding)


def _style(kind: str, news: str) -> str:
    """``news`` for a finding that is no failure."""
    return news if kind in RULES and RULES[kind].informative else ""
