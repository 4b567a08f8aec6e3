"""Below Lightning: a window on any module, points of its layers, and the judge."""

import pytest
import torch
from torch import nn

from lightning_collapse import CollapseMonitor
from lightning_collapse.monitoring import FeatureWindow, read_points
from lightning_collapse.utilities import Flag, default_taps
from tests.toys import PointKeeper, Toy, batches, fit


def test_a_plain_module_reads_what_the_monitor_does() -> None:
    names, keeper = ["encoder.0", "encoder.2", "head"], PointKeeper()
    fit(Toy(), [CollapseMonitor(layers=names, every_n_steps=3, rows=64), keeper])
    torch.manual_seed(0)
    toy = Toy()
    plain, found = nn.Sequential(toy.encoder, toy.head), []
    window = FeatureWindow(plain, default_taps(plain), torch.device("cpu"), rows=64, limit=64)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for step, batch in enumerate(batches()):
        left = -(step + 1) % 3
        window.before_batch(batch, left)
        loss = plain(batch).pow(2).mean()
        plain(batch)  # another forward pass is no training row
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        window.after_batch(left, 3)
        if left == 0:
            found += read_points(window.features(), step)
    window.close()
    assert "forward" not in vars(plain)
    mine = {(p.measure, p.step): p for p in found if p.layer == "1"}
    theirs = {(p.measure, p.step): p for p in keeper.points if p.layer == "head" and p.step > 0}
    assert mine.keys() >= theirs.keys()
    for place, point in theirs.items():
        assert mine[place].value == pytest.approx(point.value)
        assert (mine[place].n, mine[place].flag) == (point.n, point.flag)


def test_a_layer_that_has_not_run_has_no_points() -> None:
    both = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 2)})
    both.forward = lambda rows: both["used"](rows)
    window = FeatureWindow(both, default_taps(both), torch.device("cpu"), rows=16)
    window.before_batch(None, 0)
    both(torch.randn(16, 4))
    window.after_batch(0, 1)
    points = read_points(window.features(), 1, ["effective_rank"])
    assert {point.layer for point in points} == {"used"}
    assert {point.flag for point in points} == {Flag.OK}
