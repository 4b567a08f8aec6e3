"""What the README and the pages show runs, and what they list is what there is."""

import re

import pytest

from lightning_collapse.reporting import TABLES
from lightning_collapse.utilities.registry import CURVES, LAYERS, LOSSES, MEASURES, MONITORS, PENALTIES
from tests.pages import PAGES, ROOT, families_shown, filled, own

README = ROOT / "README.md"
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in (README, *PAGES)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "from transformers" in block:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    # what a block registers is gone after it
    known = [(table, dict(table)) for table in (MEASURES, CURVES, MONITORS, LOSSES, PENALTIES, LAYERS)]
    try:
        exec(compile(block, "page", "exec"), {"__name__": "page"})
    finally:
        for table, before in known:
            table.clear()
            table.update(before)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_of_a_page_are_those_of_the_registries(path):
    text = path.read_text(encoding="utf-8")
    assert filled(text) == text, "run `python -m tests.pages`"


def test_every_table_is_on_a_page():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert all(f"<!-- {name} -->" in text for name in TABLES if name not in {"measures", "curves"})
    assert sorted(families_shown()) == sorted({curve.family for curve in own()[1].values()})


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_links_and_pictures_of_a_page_are_there_and_it_is_short_enough(path):
    text = path.read_text(encoding="utf-8")
    places = re.findall(r"\]\(([^)#]+)\)", text)
    assert all(place.startswith("https://") or (path.parent / place).exists() for place in places)
    assert len(text.encode()) <= (12_288 if path == README else 20_480)
    assert path.stem == "README" or "\n\nWhat you get: " in text


def test_the_gallery_shows_every_example():
    gallery = (ROOT / "examples" / "README.md").read_text()
    shown = set(re.findall(r"\]\(([\w/]+(?:\.py)?)\)", gallery))
    folders = {"continual", "depth", "dynamics", "heads", "latents", "zoo"}
    assert shown == {path.name for path in (ROOT / "examples").glob("[a-z]*.py")} | folders
