"""Tables of the pages in ``examples/``: between two marks stands what the registries say. Run it to write them anew."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning_collapse.callbacks  # noqa: F401  registers the monitors
from lightning_collapse.reporting import TABLES
from lightning_collapse.reporting.tables import Table
from lightning_collapse.utilities.registry import CURVES, MONITORS, Curve

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "examples").glob("*.md"))


def own() -> tuple[dict[str, Any], dict[str, Curve]]:
    """Monitors and curves of the library, without those that tests define."""
    ours = {name: cls for name, cls in MONITORS.items() if cls.__module__.startswith("lightning_collapse.")}
    others = [cls for cls in MONITORS.values() if cls not in ours.values()]
    foreign = _declared(others) - _declared(ours.values())
    return ours, {name: curve for name, curve in CURVES.items() if name not in foreign}


def filled(text: str) -> str:
    """A page whose tables are those of the registries."""
    ours, curves = own()
    with patch.dict(MONITORS, ours, clear=True), patch.dict(CURVES, curves, clear=True):
        for name, table in TABLES.items():
            between = re.compile(rf"(<!-- {name}(?: of (.*?))? -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = between.sub(lambda marks, table=table: f"{marks[1]}{_part(table(), marks[2])}\n{marks[3]}", text)
    return text


def families_shown() -> list[str]:
    """Families of curves that a page says it shows, every page's."""
    marks = [
        mark for path in PAGES for mark in re.findall("<!-- curves of (.*?) -->", path.read_text(encoding="utf-8"))
    ]
    return [family for mark in marks for family in mark.split(", ")]


def _part(table: Table, families: str | None) -> str:
    """In Markdown, of curves those of some families alone: a page is not to be too long."""
    chosen = families.split(", ") if families else []
    rows = [row for row in table.rows if not families or row[0].partition("/")[0] in chosen]
    return Table(table.head, tuple(rows)).markdown()


def _declared(monitors: Iterable[Any]) -> set[str]:
    return {f"{curve.family or cls.family}/{curve.name}" for cls in monitors for curve in cls.declares}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
