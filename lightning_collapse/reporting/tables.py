"""Tables of measures, monitors, rules, losses, penalties and layers, read from the registries."""

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from inspect import getdoc, isabstract, signature
from itertools import zip_longest
from math import isnan
from textwrap import wrap

from lightning_collapse.layers.conversion import ConvertedModule
from lightning_collapse.losses.base import AntiCollapseLoss
from lightning_collapse.rules import RULES
from lightning_collapse.utilities.registry import CURVES, LAYERS, LOSSES, MEASURES, MONITORS, PENALTIES, Curve

_FACTS = ("measure", "reads", "range", "collapsed", "source")
_NARROWEST = 10
_SHAPE = (256, 7)
_OTHERS = ((512, 7), (256, 14))


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column holds names.

    Example:
        >>> print(Table(("name", "source"), (("vicreg", "Bardes et al."),)).markdown())
        | name | source |
        | --- | --- |
        | `vicreg` | Bardes et al. |
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a Markdown table."""
        cells = [[_plain(cell).replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [self.head, ["---"] * len(self.head), *([f"`{name}`", *facts] for name, *facts in cells)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def text(self, width: int | None = None) -> str:
        """For a terminal: aligned columns, cells wrapped to ``width`` characters.

        Args:
            width: Characters per line; ``None`` asks the terminal. Columns do not shrink below a readable minimum.
        """
        rows = [list(self.head), *([_plain(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        budget = (width or shutil.get_terminal_size().columns) - 2 * (len(widths) - 1)
        while sum(widths) > budget and max(widths[1:]) > _NARROWEST:
            widths[widths.index(max(widths[1:]), 1)] -= 1  # names stay whole: they are there to be copied
        return "\n".join(line for row in rows for line in _wrapped(row, widths))


def measures() -> Table:
    """What every registered measure and curve means."""
    return Table(_FACTS, features().rows + curves().rows)


def features() -> Table:
    """What every registered measure of features or of weights means."""
    known = sorted(MEASURES.values(), key=lambda measure: measure.kind == "weights")  # those of features come first
    return Table(_FACTS, tuple((m.name, m.reads, m.range, m.collapsed, m.source) for m in known))


def curves() -> Table:
    """What every other curve means, by family."""
    rows = ((key, c.reads, c.range, c.collapsed, c.source) for key, c in sorted(CURVES.items(), key=_family))
    return Table(_FACTS, tuple(rows))


def legend(drawn: Collection[tuple[str, str]] | None = None) -> str:
    """The measures as a Markdown table, for loggers that take text.

    Args:
        drawn: Family and name of the curves that are wanted; ``None`` for all.

    Example:
        >>> print(legend([("guard", "complete_collapse"), ("collapse", "effective_rank")]).splitlines()[2][:38])
        | `effective_rank` | centered spectrum
    """
    if drawn is None:
        return measures().markdown()
    names = {m.name for m in MEASURES.values() if (m.family, m.curve) in drawn}
    names |= {key for key, c in CURVES.items() if (c.family, c.name) in drawn}
    return Table(_FACTS, tuple(row for row in measures().rows if row[0] in names)).markdown()


def monitors() -> Table:
    """What every monitor is for, and the curves it draws."""
    rows = []
    for name, cls in sorted(MONITORS.items()):
        curves = ", ".join(f"`{curve}`" for curve in _curves_of(cls))
        rows.append((name, _summary(cls), getattr(cls, "family", ""), curves))
    return Table(("monitor", "what it is for", "family", "curves"), tuple(rows))


def rules() -> Table:
    """What every rule says, of which curves, and what it advises."""
    rows = []
    for kind, rule in RULES.items():
        names = (*rule.measures, *rule.optional)
        read = ", ".join(f"`{name}`" if "/" in name else f"`{rule.family}/{name}`" for name in names)
        about = ", ".join(rule.tasks) or "any"
        says = rule.says.replace("{layer}", "LAYER") or _summary(type(rule))
        advice = rule.advice or "nothing: it is a notice" if rule.informative else rule.advice
        rows.append((kind, says, read, about, advice, rule.paper))
    return Table(("verdict", "says", "reads", "task", "advice", "source"), tuple(rows))


def losses() -> Table:
    """What every loss takes, its terms, and what it reads at both ends."""
    rows = []
    for name, cls in sorted(LOSSES.items()):
        loss = cls()
        if isinstance(loss, AntiCollapseLoss):
            ends = (_end(loss.value_at_perfection, loss.at_perfection), _end(loss.value_at_collapse, loss.at_collapse))
            rows.append((name, str(loss.views), ", ".join(loss.coefficients), *ends, loss.source))
    with_labels = {cls.__name__: cls for cls in _subclasses(AntiCollapseLoss) if cls.takes_labels and cls.source}
    for name, cls in sorted(with_labels.items()):
        rows.append((name, f"{cls.views}, with {cls.takes_labels}", "", "", "", cls.source))
    return Table(("loss", "views", "terms", "at perfection", "at collapse", "source"), tuple(rows))


def penalties() -> Table:
    """What every penalty on weights remembers of a task."""
    rows = [
        (name, str(getattr(cls, "remembers", "")), str(getattr(cls, "source", ""))) for name, cls in PENALTIES.items()
    ]
    return Table(("penalty", "remembers", "source"), tuple(sorted(rows)))


def layers() -> Table:
    """What every layer that modules are converted into is for."""
    found = {name: cls for name, cls in sorted(LAYERS.items()) if issubclass(cls, ConvertedModule)}
    rows = ((name, cls.converts, cls.resists, cls.cost, cls.source) for name, cls in found.items())
    return Table(("layer", "converts", "resists", "cost", "source"), tuple(rows))


TABLES: dict[str, Callable[[], Table]] = {
    "measures": measures,
    "features": features,
    "curves": curves,
    "monitors": monitors,
    "rules": rules,
    "losses": losses,
    "penalties": penalties,
    "layers": layers,
}
"""All tables by name; ``measures`` are ``features`` and ``curves`` together."""


def _family(item: tuple[str, Curve]) -> str:
    return item[1].family


def _curves_of(cls: type) -> Iterator[str]:
    """The curves that a monitor draws: the measures it takes by default, then those that it declares."""
    declared = [
        f"{curve.family}/{curve.name}" if curve.family else curve.name for curve in getattr(cls, "declares", ())
    ]
    chosen = signature(cls).parameters.get("measures")
    default = chosen.default if chosen is not None and isinstance(chosen.default, tuple) else ()
    yield from (name for name in default if name in MEASURES and name not in declared)
    yield from declared


def _summary(cls: type) -> str:
    """The first sentence of a docstring."""
    return (getdoc(cls) or "").partition("\n\n")[0]


def _plain(cell: str) -> str:
    """One line, with names in backticks in place of the marks of docstrings."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(cell.split())).replace("``", "`")


def _end(value: float, of_shape: Callable[[int, int], float]) -> str:
    """A value, with a star where it depends on the shape of the batch."""
    if not isnan(value) and all(of_shape(*shape) == of_shape(*_SHAPE) for shape in _OTHERS):
        return f"{value:.4g}"
    return f"{of_shape(*_SHAPE):.4g}*"


def _subclasses(cls: type[AntiCollapseLoss]) -> Iterator[type[AntiCollapseLoss]]:
    for sub in cls.__subclasses__():
        if not isabstract(sub):
            yield sub
        yield from _subclasses(sub)


def _wrapped(row: list[str], widths: list[int]) -> list[str]:
    cells = [wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
    lines = zip_longest(*cells, fillvalue="")
    return ["  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines]
