"""Healthy image classifiers whose data, learning rate or length of training is out of the ordinary."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.zoo.material import Classifier, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import Data, conv_net, digit_images
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor


def classify(data: Data, model: Classifier, batches: Any, steps: int = 400, every: int = 10) -> Habitat:
    """Train a classifier and watch it with all monitors that fit."""
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()]
    held_out = lambda: accuracy(model, *data[2:])  # noqa: E731
    return Habitat(model, [batches], monitors, steps, embedding=model.body, held_out=held_out, every=every)


def classifier(norm: str = "batch", width: int = 16, **optimizer: Any) -> Classifier:
    """Three blocks of convolutions and a head."""
    return Classifier(conv_net(width=width, norm=norm), nn.Linear(4 * width, 10), **optimizer)


def warm_restarts(seed: int) -> Habitat:
    """The learning rate falls along a cosine and jumps back, five times."""
    data = digit_images(seed)
    model = classifier("group", rate=1e-2, schedule=lambda step: 0.5 + 0.5 * math.cos(math.pi * (step % 80) / 80))
    return classify(data, model, loader(*data[:2], size=64, seed=seed))


def short_last_batches(seed: int) -> Habitat:
    """1,250 images in batches of 96: the last one of an epoch holds two."""
    data = digit_images(seed)
    images, labels = data[0][:1250], data[1][:1250]
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(TensorDataset(images, labels), batch_size=96, shuffle=True, generator=order)
    return classify(data, classifier(), batches)


def tiny_steps(seed: int) -> Habitat:
    """A learning rate of 1e-5: features stay nearly as they were, and the loss falls slowly."""
    data = digit_images(seed)
    return classify(data, classifier(rate=1e-5), loader(*data[:2], size=64, seed=seed))


def folded_classes(seed: int) -> Habitat:
    """Long after the last training error: features of a class become one point."""
    data = digit_images(seed)
    model = classifier(rate=0.1, momentum=0.9, decay=2e-3)
    return classify(data, model, loader(data[0][:400], data[1][:400], size=50, seed=seed), steps=1000)


SPECIMENS = tuple(
    Specimen(name, make, says, family="convolutional classifier")
    for name, make, says in (
        ("warm restarts", warm_restarts, "jumps of the learning rate"),
        ("short last batches", short_last_batches, "batches of two among those of 96"),
        ("tiny steps", tiny_steps, "nothing moves"),
        ("folded classes", folded_classes, "neural collapse of a convolutional classifier"),
    )
)
