"""What the README shows runs, and what it lists is what there is."""

import re
from math import isnan
from pathlib import Path

import pytest

from lightning_collapse.reporting import legend
from lightning_collapse.utilities.registry import CURVES, LOSSES, MEASURES, MONITORS, PENALTIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [path.read_text() for path in sorted((ROOT / "examples").glob("*.md"))]
BLOCKS = [block for text in (README, *PAGES) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what a block registers is gone after it
    known = [(table, dict(table)) for table in (MEASURES, CURVES, MONITORS)]
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        for table, before in known:
            table.clear()
            table.update(before)


def test_table_of_measures_is_the_registry():
    table = re.search(r"<!-- measures -->\n(.*?)\n<!-- /measures -->", README, re.DOTALL).group(1)
    assert table == legend()


def test_table_of_losses_is_what_they_declare():
    for loss in (cls() for cls in LOSSES.values()):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{type(loss).__name__}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert int(cells[1]) == loss.views
        assert cells[2] == ", ".join(loss.coefficients)
        ends = (loss.value_at_perfection, loss.at_perfection), (loss.value_at_collapse, loss.at_collapse)
        for cell, (value, of_shape) in zip(cells[3:5], ends, strict=True):
            said = "7" if cell == "D" else cell.partition(" for 256 rows")[0]
            digits = len(said.partition(".")[2])
            assert float(said) == pytest.approx(of_shape(256, 7) if isnan(value) else value, abs=0.5 * 0.1**digits)


def test_every_penalty_has_a_row():
    assert PENALTIES
    for name in PENALTIES:
        assert any(line.startswith(f"| `{name}` |") for line in README.splitlines()), name


def test_the_gallery_shows_every_example():
    gallery = (ROOT / "examples" / "README.md").read_text()
    shown = set(re.findall(r"\]\(([\w/]+(?:\.py)?)\)", gallery))
    assert shown == {path.name for path in (ROOT / "examples").glob("[a-z]*.py")} | {"zoo"}
