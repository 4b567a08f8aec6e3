"""The dashboard as a TensorBoard server reads it."""

import json
import re
import subprocess
import sys
import time
from unittest.mock import patch
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_collapse.reporting import dashboard_layout, log_dashboard
from lightning_collapse.utilities.registry import CURVES, MEASURES
from tests.reporting.planted import FACTS, GLOW


@pytest.fixture(autouse=True)
def measures():
    with patch.dict(MEASURES, FACTS, clear=True), patch.dict(CURVES, {"tube/glow": GLOW}, clear=True):
        yield


def lines_of(category, chart, tags):
    """The tags in a chart, matched as TensorBoard's server does."""
    kind, [pattern] = dashboard_layout()[category][chart]
    assert kind == "Multiline"
    return {tag for tag in tags if re.compile(pattern).match(tag)}


def test_one_chart_per_measure_of_features_and_three_for_their_health():
    layout = dashboard_layout()
    assert list(layout) == ["Collapse", "Tube", "Regularizer", "Penalty", "Guard", "Health"]
    assert list(layout["Collapse"]) == ["effective_rank", "eigenvalue_effective_rank", "uniformity"]
    assert list(layout["Health"]) == ["n", "nonfinite_fraction", "flag"]


def test_a_chart_has_the_lines_of_its_measure_only():
    rank = {
        "collapse/encoder/effective_rank",
        "val/collapse/encoder/effective_rank",
        "collapse/net.layers.0/block/effective_rank",
        "run-collapse/encoder/effective_rank",
    }
    others = {
        "collapse/encoder/eigenvalue_effective_rank",
        "collapse/encoder/effective_rank_null",
        "neural_collapse/encoder/effective_rank",
        "effective_rank",
    }
    assert lines_of("Collapse", "effective_rank", rank | others) == rank
    own = {"collapse/a/n", "tube/a/n", "val/tube/n"}
    assert lines_of("Health", "n", own | {"collapse/a/nonfinite_fraction", "train/n"}) == own


def test_only_what_is_drawn_has_a_chart():
    tags = ["collapse/a/effective_rank", "val/collapse/a/flag", "accuracy", "guard/complete_collapse"]
    layout = dashboard_layout(tags)
    assert {title: list(charts) for title, charts in layout.items()} == {
        "Collapse": ["effective_rank"],
        "Guard": ["guard"],
        "Health": ["flag"],
    }
    assert all(layout[title][name] == dashboard_layout()[title][name] for title in layout for name in layout[title])
    assert dashboard_layout([]) == {}


def test_a_curve_of_another_family_has_a_chart_in_its_own_category():
    own = {"tube/a.b/glow", "tube/glow"}
    assert lines_of("Tube", "glow", own | {"collapse/a/glow", "tube/afterglow", "tube/glow/a"}) == own


@pytest.mark.parametrize("family", ["regularizer", "penalty", "guard"])
def test_a_family_is_one_chart(family):
    tags = {f"{family}/a", f"val/{family}/b"}
    assert lines_of(family.capitalize(), family, tags | {"collapse/a/n", f"collapse/{family}/n"}) == tags


def test_tensorboard_serves_every_chart_over_http(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    log_dashboard(logger, dashboard_layout(["tube/glow"]))  # the later layout holds
    log_dashboard(logger, dashboard_layout())
    logger.log_metrics({"collapse/a/effective_rank": 2.0, "collapse/a/eigenvalue_effective_rank": 1.0}, step=0)
    logger.experiment.close()

    command = [sys.executable, "-m", "tensorboard.main", "--logdir", tmp_path, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+:\d+/", line)))
            layout, served = ask(f"{url}data/plugin/custom_scalars")
        finally:
            server.kill()  # it may wait for its own threads otherwise
    titles = [category["title"] for category in layout["category"]]
    assert titles == [
        "Collapse",
        "Tube",
        "Regularizer",
        "Penalty",
        "Guard",
        "Health",
    ]
    assert served.pop("effective_rank") == ["collapse/a/effective_rank"]
    assert served.pop("eigenvalue_effective_rank") == ["collapse/a/eigenvalue_effective_rank"]
    rest = ("uniformity", "n", "nonfinite_fraction", "flag", "glow", "regularizer", "penalty", "guard")
    assert served == {name: [] for name in rest}


def ask(url):
    """The layout and the tags per chart, as TensorBoard's page asks its server for them."""

    def get(path, **query):
        with urlopen(f"{url}/{path}?{urlencode(query)}", timeout=30) as response:
            return json.load(response)

    served, deadline = {}, time.monotonic() + 30
    while not any(served.values()) and time.monotonic() < deadline:  # the server reads the files in the background
        time.sleep(0.1)
        layout = get("layout")
        charts = [chart for category in layout.get("category", []) for chart in category["chart"]]
        patterns = {chart["title"]: chart["multiline"]["tag"][0] for chart in charts}
        served = {title: list(get("scalars", run="run", tag=tag)["tag_to_events"]) for title, tag in patterns.items()}
    return layout, served
