"""Event files are read whole, in order, and as far as they are whole."""

import re
import time
from itertools import product

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_collapse.reporting.dashboard import dashboard_layout, place
from lightning_collapse.reporting.events import read_runs
from lightning_collapse.reporting.svg import thin


def write(folder, points, tag="loss"):
    with SummaryWriter(folder) as writer:
        for step, value in points:
            writer.add_scalar(tag, value, step)
        writer.add_text("words", "ä < b", 3)
        writer.add_histogram("bins", torch.tensor([1.0, 2.0]), 4)
    return folder


def test_every_point_as_tensorboard_reads_it(tmp_path):
    write(tmp_path, [(step, step / 8) for step in range(2000)])
    [run] = read_runs(tmp_path)
    theirs = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload()
    assert list(run.scalars["loss"].items()) == [(point.step, point.value) for point in theirs.Scalars("loss")]
    assert run.texts == {"words": {3: "ä < b"}}
    [histogram] = theirs.Histograms("bins")
    value = histogram.histogram_value
    assert run.histograms["bins"] == {4: (list(value.bucket_limit), list(value.bucket))}
    assert run.last_step == 1999
    assert run.ended >= run.began > 1e9


def test_folders_are_runs_in_natural_order_and_the_top_one_is_named(tmp_path):
    for name in ("version_10", "version_2", "."):
        write(tmp_path / "logs" / name, [(0, 1.0)])
    assert [run.name for run in read_runs(tmp_path / "logs")] == ["logs", "version_2", "version_10"]


def test_a_resume_replaces_what_it_repeats(tmp_path):
    for points in ([(0, 1.0), (2, 1.0), (3, 1.0)], [(2, 5.0), (1, 7.0)]):
        write(tmp_path, points)
        time.sleep(1.1)  # the second is part of the file's name
    [run] = read_runs(tmp_path)
    assert list(run.scalars["loss"].items()) == [(0, 1.0), (1, 7.0), (2, 5.0), (3, 1.0)]


@pytest.mark.parametrize("tail", [b"\x05", b"\xff" * 40, b"\x03" + b"\0" * 11 + b"\xff\xff\xff" + b"\0" * 4])
def test_what_stands_before_a_broken_end_is_read(tail, tmp_path):
    write(tmp_path, [(0, 1.0), (1, 2.0)])
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + tail)
    (tmp_path / "empty.tfevents.0").touch()
    [run] = read_runs(tmp_path)
    assert run.scalars == {"loss": {0: 1.0, 1: 2.0}}


@pytest.mark.parametrize("most", [8, 50, 500])
def test_thinning_keeps_ends_extremes_and_holes(most):
    values = [float(i % 7) for i in range(5000)]
    values[2222], values[3333], values[4444] = 99.0, -99.0, float("nan")
    steps, kept = thin(range(5000), values, most)
    assert len(steps) <= most
    assert steps == sorted(set(steps))
    assert {0, 2222, 3333, 4444, 4999} <= set(steps)
    assert all(values[step] == value for step, value in zip(steps, kept, strict=True) if value == value)


def test_the_page_groups_as_the_dashboard_does():
    fills = {"(.+/)?": ("a/b.c/", ""), "[^/]+": ("a-b",), ".+": ("a/b.c",)}
    layout = dashboard_layout()
    del layout["Health"]
    for category, charts in layout.items():
        for chart, (_, [pattern]) in charts.items():
            body = pattern.removeprefix("(.*-)?(val/)?").removesuffix("$")
            blank = next(blank for blank in fills if blank in body)
            for prefix, fill in product(("", "val/", "run-", "run-val/"), fills[blank]):
                tag = prefix + body.replace(blank, fill)
                assert re.fullmatch(pattern, tag)
                at = place(tag)
                assert (at.category, at.chart, at.line) == (category, chart, prefix + (fill.removesuffix("/") or "all"))
    for tag in ("collapse/a.b/n", "val/collapse/a.b/n", "run-neural_collapse/a/flag"):
        at = place(tag)
        assert (at.category, at.line) == ("Health", tag.rpartition("/")[0])
        assert re.fullmatch(dashboard_layout()["Health"][at.chart][1][0], tag)
    assert place("collapse/a/of_my_own").chart == "of_my_own"
    assert place("accuracy") is place("collapse") is place("collapse/a") is None
