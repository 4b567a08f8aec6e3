"""Healthy networks with a layer that looks ill: frozen in evaluation mode, or two features wide."""

from typing import Any

from torch import nn

from examples.zoo.material import Classifier, loader, mlp
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.fine_tuning import pretrained
from examples.zoo.vision.parts import conv_net, digit_images
from examples.zoo.vision.schedules import classify


class Frozen(Classifier):
    """A classifier whose first two blocks neither learn nor update their statistics."""

    body: nn.Sequential

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Frozen layers stay in evaluation mode."""
        self.body[:2].eval()


def frozen_layers(seed: int) -> Habitat:
    """Pretrained blocks with BatchNorm, frozen."""
    data = digit_images(seed)
    body = conv_net(norm="batch")
    body.load_state_dict(pretrained(seed, norm="batch"))
    body[:2].requires_grad_(False)
    return classify(data, Frozen(body, nn.Linear(64, 10)), loader(*data[:2], size=64, seed=seed))


def narrow(seed: int) -> Habitat:
    """Ten classes through two features, to draw them."""
    data = digit_images(seed)
    body = nn.Sequential(conv_net(norm="batch"), nn.Linear(64, 2))
    head = mlp(2, 64, 10)
    return classify(data, Classifier(body, head, rate=5e-3), loader(*data[:2], size=64, seed=seed), steps=500)


SPECIMENS = (
    Specimen("frozen layers", frozen_layers, "layers in evaluation mode", family="convolutional classifier"),
    Specimen("two features", narrow, "a bottleneck by design", family="convolutional classifier"),
)
