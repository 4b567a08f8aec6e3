"""Verdict cards: what was found in each run, in one sentence and the curve it rests on, and then with all evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from math import inf, isfinite

from lightning_collapse.reporting.dashboard import category as category_of
from lightning_collapse.reporting.figures import curves_figure, limits_of, sparkline
from lightning_collapse.reporting.run_view import Board, Curve
from lightning_collapse.reporting.svg import Marks, prose, text
from lightning_collapse.reporting.verdicts import Finding
from lightning_collapse.rules import ALL, RULES, Rule, Task
from lightning_collapse.rules.coverage import counted

_VERDICTS, _BARS = 12, 40  # most that are drawn of a run


def run_card(board: Board) -> str:
    """What was found in a run, in one sentence, and the curve that it rests on."""
    failures = [finding for finding in board.findings if not is_notice(finding.kind)]
    first = next(iter(failures or board.findings), None)
    seconds = board.run.ended - board.run.began
    facts = {
        "last step": str(board.run.last_step),
        "layers": str(len(board.layers)),
        "points": str(board.points),
        "curves": str(sum(len(lines) for charts in board.charts.values() for lines in charts.values())),
        "duration": str(timedelta(seconds=round(seconds))) if isfinite(seconds) else "unknown",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    said, picture = _nothing_found(board) if first is None else (_headline(first), _evidence(board, first))
    more = len(board.findings) - 1
    if more > 0:
        others = "; ".join(
            f"{where(finding)} since step {finding.since}" for finding in board.findings if finding is not first
        )
        said += f"<p class=soft>And {counted(more, 'further verdict')}: {text(others)}.</p>"
    return (
        f'<article class="card {"bad" if failures else "news"}"><p class="name soft">{text(board.run.name)}</p>'
        f"<div class=beside><div>{said}<dl>{items}</dl></div><div>{picture}</div></div></article>\n"
    )


def verdict_cards(board: Board, most: int) -> str:
    """When each verdict of a run held, and each with its evidence and what helps."""
    if not board.findings:
        return ""
    cards = "".join(_card(board, finding, most) for finding in board.findings[:_VERDICTS])
    if (count := len(board.findings)) > _VERDICTS:
        cards += f"<p class=soft>The first {_VERDICTS} of {count} verdicts with their evidence.</p>"
    return _time_line(board) + cards


def marks_of(board: Board, category: str, layer: str | None = None) -> list[tuple[int, str]]:
    """Since when layers were judged by a curve of this category."""
    marks: dict[int, str] = {}
    for finding in board.findings:
        rule = RULES.get(finding.kind)
        if rule is not None and category_of(rule.family) == category and layer in (None, finding.layer):
            words = f"{where(finding)} since step {finding.since}"
            marks[finding.since] = f"{marks[finding.since]}; {words}" if finding.since in marks else words
    return list(marks.items())[:8]


def where(finding: Finding) -> str:
    """Kind and layer in words."""
    return f"{finding} in {finding.layer}" if finding.layer else str(finding)


def read_by(rule: Rule) -> list[tuple[str, str]]:
    """Categories and charts of the curves that a rule reads, of other families too."""
    parts = [measure.rpartition("/") for measure in (*rule.measures, *rule.optional)]
    return [(category_of(family or rule.family), name) for family, _, name in parts]


def is_notice(kind: str) -> bool:
    """Whether it is no failure."""
    return kind in RULES and RULES[kind].informative


def _headline(finding: Finding) -> str:
    title = str(finding).capitalize()
    name = f" in <code>{text(finding.layer)}</code>" if finding.layer else ""
    says = f"<p>{prose(finding.says)}</p>" if finding.says else ""
    return f"<h3>{text(title)}{name} since step {finding.since}</h3>{says}"


def _nothing_found(board: Board) -> tuple[str, str]:
    """What is said of a run without a verdict, and of all layers the lowest rank as a share of what noise reads."""
    judged = "Guard" in board.charts
    over = f"in {counted(len(board.layers), 'layer')} over {counted(board.points, 'point')}"
    said = f"<h3>{'No verdict' if judged else 'Not judged: no CollapseGuard'}</h3>"
    said += f"<p>{'The guard was there and said nothing' if judged else 'Curves were drawn'}, {over}.</p>"
    ranks = {
        (chart, line): board.last("Collapse", chart, line)
        for chart in ("eigenvalue_effective_rank", "effective_rank")
        for line in board.charts.get("Collapse", {}).get(chart, {})
    }
    if not ranks:
        return said, ""
    chart, line = min(ranks, key=lambda at: ranks[at][0] / ranks[at][1] if ranks[at][1] > 0 else inf)
    name = f"{chart} of {line}, of all layers the lowest beside noise"
    return said, _spark(board, "Collapse", chart, line, name, ())


def _evidence(board: Board, finding: Finding) -> str:
    """The first curve that the rule reads."""
    rule = RULES.get(finding.kind)
    marks = [(finding.since, f"since step {finding.since}")]
    if rule is not None:
        for category, measure in read_by(rule):
            lines = board.charts.get(category, {}).get(measure, {})
            for line in (finding.layer, ALL):
                if line in lines:
                    return _spark(board, category, measure, line, f"{measure} of {line}", marks)
    counts = board.charts.get("Guard", {}).get("guard", {})
    if finding.kind in counts:
        return _spark(board, "Guard", "guard", finding.kind, "layers that are judged so", marks)
    return ""


def _spark(board: Board, category: str, chart: str, line: str, name: str, marks: Marks) -> str:
    curve, null = board.charts[category][chart][line], board.null(category, chart, line)
    return sparkline(name, curve, null, (0, board.run.last_step), marks)


def _time_line(board: Board) -> str:
    """Bars over steps, each below its name."""
    last = max(board.run.last_step, 1)
    bars = ""
    for finding in board.findings[:_BARS]:
        left, wide = (100 * share / last for share in (finding.since, finding.until - finding.since))
        said = f"since step {finding.since}, said at step {finding.step}"
        bars += (
            f"<div>{text(where(finding))} <span class=soft>{said}</span>"
            f'</div><div class=track><i class={_style(finding.kind)} style="left:{left:.2f}%;width:{wide:.2f}%"></i>'
            f'<b style="left:{100 * finding.step / last:.2f}%"></b></div>'
        )
    note = "From the step since when to the end of the verdict; the dot is the step at which it was said."
    return (
        f"<figure class=card><b>When</b> <span class=soft>{text(board.run.name)}</span><div class=when>{bars}"
        f"<div class=ends><span>step 0</span><span>step {board.run.last_step}</span></div></div>"
        f"<figcaption>{note}</figcaption></figure>\n"
    )


def _card(board: Board, finding: Finding, most: int) -> str:
    rule = RULES.get(finding.kind)
    name = f" in <code>{text(finding.layer)}</code>" if finding.layer else ""
    words = [f"<p><b>{prose(finding.says)}</b></p>"] if finding.says else []
    words += [f"<p>{prose(finding.told[:1].upper() + finding.told[1:])}.</p>"] if finding.told else []
    if not finding.layer:
        words.append(
            '<p>Only the number of layers was logged; <code>CollapseGuard(action="log")</code> also names them.</p>'
        )
    if advice := finding.advice or getattr(rule, "advice", ""):
        words.append(f"<p><b>What helps:</b> {prose(advice)}</p>")
    if paper := getattr(rule, "paper", ""):
        words.append(f"<p class=soft>{text(paper)}</p>")
    since = f"since step {finding.since}, said at step {finding.step}" if finding.layer else f"at step {finding.step}"
    figures = "" if rule is None else "".join(_figures(board, finding, rule, most))
    return (
        f'<article class="card {_style(finding.kind)}"><h3>{text(str(finding).capitalize())}{name}</h3>'
        f"<p class=soft>{text(board.run.name)}, {since}</p><div class=beside><div>{''.join(words)}</div>"
        f"<div class=grid>{figures}</div></div></article>\n"
    )


def _figures(board: Board, finding: Finding, rule: Rule, most: int) -> list[str]:
    """All curves that the rule reads, of the layer, or of every layer where none is named."""
    marks = [(finding.since, f"since step {finding.since}"), (finding.step, f"said at step {finding.step}")]
    marks = [(finding.since, "; ".join(word for _, word in marks))] if finding.since == finding.step else marks
    figures = []
    for category, measure in read_by(rule):
        lines: Mapping[str, Curve] = board.charts.get(category, {}).get(measure, {})
        names: Sequence[str] = list(lines)
        if finding.layer:
            names = [finding.layer, *([ALL] if rule.applies_to(ALL, Task()) else [])]
        curves = {name: lines[name] for name in names if name in lines}
        nulls = {name: board.null(category, measure, name) for name in curves}
        if curves:
            limits = limits_of([*curves.values(), *nulls.values()])
            span = (0, board.run.last_step)
            figures.append(curves_figure(measure, "", curves, limits, span, marks, nulls, most))
    return figures


def _style(kind: str) -> str:
    return "news" if is_notice(kind) else "bad"
