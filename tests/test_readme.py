"""What the README shows runs, and what it lists is what there is."""

import re
from pathlib import Path

import pytest

from lightning_collapse.reporting import legend
from lightning_collapse.utilities.registry import LOSSES

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block, tmp_path, monkeypatch):
    from lightning_collapse.utilities.registry import MEASURES

    monkeypatch.chdir(tmp_path)
    known = dict(MEASURES)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        MEASURES.clear()
        MEASURES.update(known)


def test_table_of_measures_is_the_registry():
    table = re.search(r"<!-- measures -->\n(.*?)\n<!-- /measures -->", README, re.DOTALL).group(1)
    assert table == legend()


def test_table_of_losses_is_what_they_declare():
    for loss in (cls() for cls in LOSSES.values()):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{type(loss).__name__}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert int(cells[1]) == loss.views
        assert cells[2] == ", ".join(loss.coefficients)
        assert float(cells[3]) == pytest.approx(loss.value_at_perfection, abs=5e-5)
        collapse = loss.at_collapse(1000, 7)
        assert (7 if cells[4] == "D" else float(cells[4])) == pytest.approx(collapse, abs=5e-5)
