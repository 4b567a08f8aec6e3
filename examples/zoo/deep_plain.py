"""Collapse at initialization: a deep network without normalization maps all images onto one point from step one."""

from torch import nn

from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .material import Classifier, accuracy, digits, loader, mlp
from .specimen import Habitat, Specimen

DEPTH = 16


def make(seed: int, norm: bool) -> Habitat:
    """Digits."""
    images, labels, test, classes = digits(seed)
    model = Classifier(mlp(64, *[64] * DEPTH, norm=norm), nn.Linear(64, 10), rate=0.01, momentum=0.0)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=100,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
    )


SPECIMEN = Specimen(
    "deep without normalization",
    make,
    "sixteen layers make all images alike before training begins",
    kind="complete_collapse",
    setting="norm",
    healthy=True,
    sick=False,
    layers=("body*", "head*"),
    develops=False,
    family="plain classifier",
)
