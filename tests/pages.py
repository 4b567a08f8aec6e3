"""Tables of the pages in ``examples/``: between two marks stands what the registries say. Run it to write them anew."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning_collapse.callbacks  # noqa: F401  registers the monitors
from lightning_collapse.reporting import TABLES
from lightning_collapse.utilities.registry import CURVES, MONITORS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "examples").glob("*.md"))


def filled(text: str) -> str:
    """A page whose tables are those of the registries."""
    # without the monitors that tests define
    ours = {name: cls for name, cls in MONITORS.items() if cls.__module__.startswith("lightning_collapse.")}
    others = [cls for cls in MONITORS.values() if cls not in ours.values()]
    foreign = _declared(others) - _declared(ours.values())
    curves = {name: curve for name, curve in CURVES.items() if name not in foreign}
    with patch.dict(MONITORS, ours, clear=True), patch.dict(CURVES, curves, clear=True):
        for name, table in TABLES.items():
            between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            text = between.sub(lambda marks, table=table: f"{marks[1]}{table().markdown()}\n{marks[2]}", text)
    return text


def _declared(monitors: Iterable[Any]) -> set[str]:
    return {f"{curve.family or cls.family}/{curve.name}" for cls in monitors for curve in cls.declares}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
