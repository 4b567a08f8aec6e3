"""Plasticity loss: labels change their meaning again and again, and a high learning rate kills units on the way."""

from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .material import Classifier, accuracy, digits, loader, mlp
from .specimen import Habitat, Specimen

PERIOD = 40


class Shifting(Classifier):
    """Every 40 steps each label is the next one."""

    def relabel(self, labels: Tensor) -> Tensor:
        """What labels mean now."""
        return (labels + self.global_step // PERIOD) % 10

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return super().training_step((batch[0], self.relabel(batch[1])), batch_idx)


def make(seed: int, rate: float) -> Habitat:
    """Digits."""
    images, labels, test, classes = digits(seed)
    model = Shifting(nn.Sequential(mlp(64, 128, 128, 128), nn.ReLU()), nn.Linear(128, 10), rate=rate)
    return Habitat(
        model,
        [loader(images, labels, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=400,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, model.relabel(classes)),
    )


SPECIMEN = Specimen(
    "dormant ReLUs",
    make,
    "a high learning rate on labels that change kills units",
    kind="plasticity_loss",
    setting="rate",
    healthy=1e-3,
    sick=3e-2,
    layers=("body*",),
    family="continual",
)
