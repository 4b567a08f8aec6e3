"""Complete collapse: a weight decay a thousand times too strong, switched on in the midst of training."""

from typing import Any

import torch
from torch import nn

from examples.zoo.material import Classifier, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.transformer import Transformer
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .parts import digit_images

ONSET = 150


class Decayed(Classifier):
    """A classifier by SGD whose body decays by ``later`` from a step on."""

    def __init__(self, later: float) -> None:
        super().__init__(Transformer((2, 2), 16, 32, 3), nn.Linear(32, 10), rate=0.02, momentum=0.9)
        self.later = later

    def configure_optimizers(self) -> Any:
        """Two groups."""
        groups = [{"params": self.body.parameters()}, {"params": self.head.parameters()}]
        return torch.optim.SGD(groups, self.rate, self.momentum or 0.0, weight_decay=5e-3)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The fault."""
        if self.global_step == ONSET:
            self.trainer.optimizers[0].param_groups[0]["weight_decay"] = self.later


def make(seed: int, later: float) -> Habitat:
    """Digits with labels."""
    images, labels, test, classes = digit_images(seed)
    model = Decayed(later)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=450,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
        every=10,
    )


SPECIMEN = Specimen(
    "weight decay of 5",
    make,
    "weights of the encoder fade, and with them all that tells images apart",
    kind="complete_collapse",
    setting="later",
    healthy=5e-3,
    sick=5.0,
    layers=("body*", "head*"),
    family="vision transformer",
    claims=("dimensional_collapse", "plasticity_loss", "attention_overload"),
    onset=ONSET,
)
