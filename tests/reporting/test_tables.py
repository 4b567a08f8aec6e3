"""Tables, read from the registries: of whatever is registered, as Markdown and for a terminal."""

import re
from unittest.mock import patch

import pytest

import lightning_collapse.callbacks  # noqa: F401  registers the monitors
from lightning_collapse.reporting import TABLES, legend
from lightning_collapse.reporting.tables import measures
from lightning_collapse.rules import RULES
from lightning_collapse.utilities.registry import CURVES, LOSSES, MEASURES, MONITORS, PENALTIES, Measure
from tests.reporting.planted import FACTS, GLOW


@pytest.fixture
def few():
    with patch.dict(MEASURES, FACTS, clear=True), patch.dict(CURVES, {"tube/glow": GLOW}, clear=True):
        yield


@pytest.mark.usefixtures("few")
def test_legend_is_a_markdown_table():
    header, rule, *rows = legend().splitlines()
    assert header == "| measure | reads | range | collapsed | source |"
    assert rule == "| --- | --- | --- | --- | --- |"
    assert rows == [
        "| `effective_rank` | centered spectrum | 1 to K | 1 | Roy & Vetterli 2007 |",
        r"| `eigenvalue_effective_rank` | raw spectrum | \|x\| to K |  |  |",
        "| `uniformity` | rows |  | 0, all points equal |  |",
        "| `alignment` | pairs |  |  |  |",
        "| `tube/glow` | a tube | 0 to 1 | 0 | Crookes 1875 |",
    ]


@pytest.mark.usefixtures("few")
def test_legend_of_some_curves_is_short():
    assert legend([("tube", "glow"), ("collapse", "uniformity")]).splitlines()[2:] == [
        "| `uniformity` | rows |  | 0, all points equal |  |",
        "| `tube/glow` | a tube | 0 to 1 | 0 | Crookes 1875 |",
    ]


@pytest.mark.parametrize("width", [10, 74, 80, 400])
@pytest.mark.usefixtures("few")
def test_table_for_the_terminal_says_the_same_and_fits(width):
    text = measures().text(width)
    assert width < 74 or max(map(len, text.splitlines())) <= width
    assert sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", legend().replace("---", "")))
    assert all(line == line.rstrip() for line in text.splitlines())


def test_table_for_the_terminal_asks_it_for_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert measures().text() == measures().text(72) != measures().text(400)


@pytest.mark.parametrize(
    ("name", "registry"),
    [("monitors", MONITORS), ("rules", RULES), ("losses", LOSSES), ("penalties", PENALTIES), ("measures", MEASURES)],
)
def test_every_table_has_a_row_with_a_source_for_everything_that_is_ours(name, registry):
    table = TABLES[name]()
    ours = {key for key, of in registry.items() if _module(of).startswith("lightning_collapse.")}
    rows = {row[0]: row for row in table.rows}
    assert ours <= rows.keys()
    assert all(len(row) == len(table.head) for row in table.rows)
    for key in ours:
        cells = dict(zip(table.head, rows[key], strict=True))
        required = {"source", "says", "reads", "what it is for", "curves", "terms", "remembers"} & cells.keys()
        assert all(cells[column] for column in required), key


def _module(of):
    of = of.fn if isinstance(of, Measure) else of
    return getattr(of, "__module__", type(of).__module__)


def test_ends_of_losses_have_a_star_where_they_depend_on_the_shape():
    rows = {row[0]: row for row in TABLES["losses"]().rows}
    assert rows["VICReg"][3:5] == ("0", "24.75")
    assert rows["BarlowTwins"][3:5] == ("0", "7*")
    assert rows["DotRegression"][1] == "1, with classes"
    for name, cls in LOSSES.items():
        loss = cls()
        for cell, of_shape in zip(rows[name][3:5], (loss.at_perfection, loss.at_collapse), strict=True):
            assert float(cell.removesuffix("*")) == pytest.approx(of_shape(256, 7), rel=1e-3, abs=1e-9)
