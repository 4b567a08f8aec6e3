"""What every monitor refuses before a fit starts."""

import pytest

from lightning_collapse import (
    AttentionEntropyMonitor,
    CollapseMonitor,
    GeometryPhaseMonitor,
    GradientMonitor,
    IntrinsicDimensionMonitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
    SpectralAlignmentMonitor,
    WeightSpectrumMonitor,
)

OF_LAYERS = [
    AttentionEntropyMonitor,
    CollapseMonitor,
    GradientMonitor,
    IntrinsicDimensionMonitor,
    SpectralAlignmentMonitor,
    WeightSpectrumMonitor,
]
OF_ONE = [GeometryPhaseMonitor, NeuralCollapseMonitor, RegressionCollapseMonitor]


@pytest.mark.parametrize("monitor", OF_LAYERS)
@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ("encoder", r"`layers` takes a list of names, got the string 'encoder'\. Write `layers=\['encoder'\]`"),
        ([], "`layers` is empty. Leave it out to take"),
        (3, "`layers` takes a list of names of submodules, got 3"),
        ([1], r"`layers` takes a list of names of submodules, got \[1\]"),
    ],
)
def test_layers(monitor, layers, match):
    with pytest.raises(ValueError, match=match):
        monitor(layers)


@pytest.mark.parametrize("monitor", [*OF_LAYERS, *OF_ONE])
@pytest.mark.parametrize("every", [0, -3, 2.5, "epoch"])
def test_cadence(monitor, every):
    with pytest.raises(ValueError, match=f"`every_n_steps` must be a whole number of at least 1, .* got {every!r}"):
        monitor(every_n_steps=every)
