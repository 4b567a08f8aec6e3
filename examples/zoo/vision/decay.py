"""Complete collapse: a weight decay a thousand times too strong, switched on in the midst of training."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Classifier, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .parts import digit_images

ONSET = 150


class Patches(nn.Module):
    """A small vision transformer on four patches of four by four pixels and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 48, 2, stride=2)
        self.token, self.place = (nn.Parameter(0.1 * torch.randn(1, length, 48)) for length in (1, 17))
        layers = (
            nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)
        )
        self.blocks = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        """The class token."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1) + self.place
        for layer in self.blocks:
            tokens = layer(tokens)
        first: Tensor = tokens[:, 0]
        return first


class Decayed(Classifier):
    """A classifier by SGD whose body decays by ``later`` from a step on."""

    def __init__(self, later: float) -> None:
        super().__init__(Patches(), nn.Linear(48, 10), rate=0.02, momentum=0.9)
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
