"""Features that fine-tuning destroys: a pretrained encoder, a small task, and a learning rate thirty times too high."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.material import Classifier, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .parts import conv_net, digit_images, probe


@cache
def pretrained(seed: int, norm: str = "group", steps: int = 150) -> dict[str, Tensor]:
    """Weights of an encoder that learned all ten digits."""
    images, labels, _, _ = digit_images(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(conv_net(norm=norm), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        batches = iter(loader(images, labels, size=64, seed=seed))
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(model.training_step(next(batches), 0))
            optimizer.step()
    return dict(model.body.state_dict())


def make(seed: int, factor: float) -> Habitat:
    """Is a digit even? From 200 images."""
    data = digit_images(seed)
    images, labels, test, classes = data
    body = conv_net(norm="group")
    body.load_state_dict(pretrained(seed))
    model: Any = Classifier(body, nn.Linear(64, 2), rate=2e-3 * factor)
    return Habitat(
        model,
        [loader(images[:200], labels[:200] % 2, size=50, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()],
        steps=400,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes % 2),
        every=10,
        outcome=lambda trained: probe(trained.body, data),
    )


SPECIMEN = Specimen(
    "fine-tuning too fast",
    make,
    "what the encoder knew of ten digits is gone",
    kind="dimensional_collapse",
    setting="factor",
    healthy=1.0,
    sick=30.0,
    layers=("body*", "head*"),
    family="convolutional classifier",
    claims=("partial_collapse", "plasticity_loss", "loss_explosion"),
)
