"""Between points nobody is asked: a layer that does not run costs a step no more than one that does."""

import pytest
from torch import nn

from lightning_collapse import (
    CollapseMonitor,
    GeometryPhaseMonitor,
    IntrinsicDimensionMonitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
)
from lightning_collapse.monitoring import feature_window
from tests.toys import Toy, batches, fit

MONITORS = {
    "collapse": lambda: CollapseMonitor(["unused"], every_n_steps=4),
    "geometry": lambda: GeometryPhaseMonitor("unused", every_n_steps=4),
    "intrinsic dimension": lambda: IntrinsicDimensionMonitor(["unused"], 4),
    "regression": lambda: RegressionCollapseMonitor("unused", every_n_steps=4),
}


def run(monitor):
    model = Toy()
    model.unused = nn.Linear(3, 2)
    fit(model, [monitor], batches(12))


@pytest.mark.filterwarnings("ignore:`.*Monitor`")  # they say that it does not run
@pytest.mark.parametrize("name", MONITORS)
def test_processes_agree_at_the_first_batch_and_at_points_only(name, monkeypatch):
    asked = []

    def counted(numbers, device):
        asked.append(numbers)
        return list(numbers)

    monkeypatch.setattr(feature_window, "max_over_processes", counted)
    run(MONITORS[name]())
    # of twelve steps three end in a point; labels or targets, which some batches lack, are looked for in the one before
    assert 1 < len(asked) <= (7 if name == "regression" else 4)


@pytest.mark.filterwarnings("ignore:`.*Monitor`")
def test_labels_are_looked_for_at_the_first_batch_and_at_points_only():
    asked = []
    run(NeuralCollapseMonitor("unused", labels=asked.append, every_n_steps=4))
    assert len(asked) == 7  # in the batches before points too, as long as none was found
