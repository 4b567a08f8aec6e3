"""Catastrophic forgetting: digits 5 to 9 after digits 0 to 4, with or without the old ones among the new."""

import torch
from torch import nn

from lightning_collapse import (
    CollapseMonitor,
    ContinualMetrics,
    NeuralCollapseMonitor,
    PlasticityMonitor,
    SpectralAlignmentMonitor,
)

from .material import Classifier, accuracy, digits, loader, mlp
from .specimen import Habitat, Specimen


def make(seed: int, rehearsal: bool) -> Habitat:
    """Two tasks of five digits each."""
    images, labels, test, classes = digits(seed)
    model = Classifier(nn.Sequential(mlp(64, 128, 128), nn.ReLU()), nn.Linear(128, 10))
    first = labels < 5
    second = torch.ones_like(first) if rehearsal else ~first
    early = classes < 5
    held_out = [[(test[early], classes[early])], [(test[~early], classes[~early])]]
    return Habitat(
        model,
        [loader(images[rows], labels[rows], size=64, seed=seed) for rows in (first, second)],
        [
            CollapseMonitor(),
            SpectralAlignmentMonitor(),
            NeuralCollapseMonitor(),
            PlasticityMonitor(),
            ContinualMetrics(held_out, every_n_steps=5),
        ],
        steps=100,
        embedding=model.body,
        held_out=lambda: accuracy(model, test[early], classes[early]),
    )


SPECIMEN = Specimen(
    "no rehearsal",
    make,
    "the second task wipes out the first",
    kind="catastrophic_forgetting",
    setting="rehearsal",
    healthy=True,
    sick=False,
    family="continual",
)
