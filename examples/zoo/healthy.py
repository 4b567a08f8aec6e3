"""Healthy runs that look dangerous."""

import io
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .joint_embedding import joint_embedding
from .material import Classifier, accuracy, digits, loader, mlp, warm_up
from .minority import imbalanced
from .specimen import Habitat, Specimen

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def classify(data: Data, seed: int, model: Classifier, steps: int, size: int = 64, **trainer: Any) -> Habitat:
    """Train a classifier and watch it with all monitors that fit."""
    images, labels, test, classes = data
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor(), PlasticityMonitor()]
    return Habitat(
        model,
        [loader(images, labels, size=size, seed=seed)],
        monitors,
        steps,
        embedding=model.body,
        held_out=lambda: accuracy(model, test, classes),
        trainer=trainer,
    )


def classifier(classes: int = 10, norm: bool = False, **optimizer: Any) -> Classifier:
    """Two hidden layers."""
    body = nn.Sequential(mlp(64, 128, 128, norm=norm), *([nn.BatchNorm1d(128)] if norm else []), nn.ReLU())
    return Classifier(body, nn.Linear(128, classes), **optimizer)


def large_mean(seed: int) -> Habitat:
    """Images that are not centered, far from zero."""
    images, labels, test, classes = digits(seed)
    return classify((images + 2, labels, test + 2, classes), seed, classifier(rate=5e-4), steps=200)


def tiny_batches(seed: int) -> Habitat:
    """Eight images for 64 features."""
    return joint_embedding(seed, size=8, rate=5e-4)


def transient(seed: int) -> Habitat:
    """A short warm-up to a high rate, with BatchNorm."""
    return classify(digits(seed), seed, classifier(norm=True, rate=1e-2, schedule=warm_up(50)), steps=200)


def terminal_phase(seed: int) -> Habitat:
    """Long after the last training error, with BatchNorm and weight decay (arXiv 2008.08186)."""
    images, labels, test, classes = digits(seed)
    data = images[:500], labels[:500], test, classes
    return classify(data, seed, classifier(norm=True, rate=0.05, momentum=0.9, decay=5e-3), steps=400)


def two_classes(seed: int) -> Habitat:
    """Even or odd: one direction is all that the head needs."""
    images, labels, test, classes = digits(seed)
    return classify((images, labels % 2, test, classes % 2), seed, classifier(2), steps=300)


def half_precision(seed: int) -> Habitat:
    """bfloat16."""
    return classify(digits(seed), seed, classifier(), steps=200, precision="bf16-mixed")


def long_tail(seed: int) -> Habitat:
    """A tenth of the images of half of the classes; the classifier learns them all the same."""
    return classify(imbalanced(seed, 10), seed, classifier(), steps=300)


def fine_tuning(seed: int) -> Habitat:
    """From a checkpoint of 150 steps on 0 to 4, on all digits."""
    images, labels, test, classes = digits(seed)
    old, early = classifier(), labels < 5
    optimizer = torch.optim.AdamW(old.parameters(), lr=2e-3)
    batches = iter(loader(images[early], labels[early], size=64, seed=seed))
    for _ in range(150):
        optimizer.zero_grad()
        torch.autograd.backward(old.training_step(next(batches), 0))
        optimizer.step()
    checkpoint = io.BytesIO()
    torch.save(old.state_dict(), checkpoint)
    checkpoint.seek(0)
    model = classifier(rate=5e-4)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return classify((images, labels, test, classes), seed, model, steps=200)


def low_rank_data(seed: int) -> Habitat:
    """Images of which four principal axes are left: features cannot have many more."""
    images, labels, test, classes = digits(seed)
    axes = torch.linalg.svd(images - images.mean(dim=0), full_matrices=False).Vh[:4]
    images, test = (rows @ axes.T @ axes for rows in (images, test))
    return classify((images, labels, test, classes), seed, classifier(), steps=200)


SPECIMENS = (
    Specimen("large means", large_mean, "ReLU features far from zero", family="plain classifier"),
    Specimen("tiny batches", tiny_batches, "fewer rows than features", family="joint embedding"),
    Specimen("warm-up", transient, "a transient at a high learning rate", family="language model"),
    Specimen("terminal phase", terminal_phase, "neural collapse of a classifier", family="plain classifier"),
    Specimen("two classes", two_classes, "one loud direction", family="plain classifier"),
    Specimen("bfloat16", half_precision, "rounding", family="language model"),
    Specimen("long tail", long_tail, "imbalance 1:10 that is learned well", family="plain classifier"),
    Specimen("fine-tuning", fine_tuning, "begins with collapsed classes", family="plain classifier"),
    Specimen("low-rank data", low_rank_data, "few directions by nature", family="plain classifier"),
)
