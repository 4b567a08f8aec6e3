"""A healthy deep network of tanh, which has few directions at the start."""

from torch import nn

from examples.zoo.material import Classifier, accuracy, digits, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor


def deep_tanh(seed: int) -> Habitat:
    """Ten layers of tanh, whose small weights leave few directions at the start."""
    images, labels, test, classes = digits(seed)
    widths = [64] * 8
    body = nn.Sequential(*(part for width in widths for part in (nn.Linear(64, width), nn.Tanh())))
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    model = Classifier(body, nn.Linear(64, 10), rate=5e-4)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=400,
        every=10,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
    )


SPECIMENS = (Specimen("deep tanh", deep_tanh, "few directions at the start", family="image classifier"),)
