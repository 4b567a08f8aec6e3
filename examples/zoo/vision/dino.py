"""Prototype collapse: self-distillation whose teacher's scores are sharpened but not centred."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen

from .parts import Learner, conv_net, digit_images, projector, self_supervised, two_views, usage

PROTOTYPES = 64


class Distillation(Learner):
    """A student that predicts which prototypes its slow copy gives another view (DINO, arXiv:2104.14294).

    Args:
        centres: Whether the mean of the teacher's scores is taken off.
    """

    centre: Tensor

    def __init__(self, centres: bool) -> None:
        super().__init__(rate=2e-3)
        self.centres = centres
        self.encoder = conv_net()
        self.prototypes = nn.Sequential(projector(64, 64, 32), nn.Linear(32, PROTOTYPES, bias=False))
        student = nn.Sequential(self.encoder, self.prototypes)
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(PROTOTYPES))

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy between the prototypes of two views."""
        first, second = two_views(batch[0])
        with torch.no_grad():
            targets = [self.teacher(view) for view in (second, first)]
        loss = torch.stack([self._loss(view, target) for view, target in zip((first, second), targets, strict=True)])
        if self.centres:
            self.centre.lerp_(torch.cat(targets).mean(dim=0), 0.1)
        return loss.mean()

    def _loss(self, view: Tensor, target: Tensor) -> Tensor:
        scores = self.prototypes(self.encoder(view)) / 0.1
        return nn.functional.cross_entropy(scores, ((target - self.centre) / 0.04).softmax(dim=1))

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The teacher follows."""
        student = [*self.encoder.parameters(), *self.prototypes.parameters()]
        for slow, fast in zip(self.teacher.parameters(), student, strict=True):
            slow.lerp_(fast, 0.02)


def make(seed: int, centres: bool) -> Habitat:
    """Digits without labels."""
    data, model = digit_images(seed), Distillation(centres)
    return self_supervised(model, seed, model.prototypes, lambda m: usage(m.prototypes(m.encoder(data[2]))))


SPECIMEN = Specimen(
    "distillation without centring",
    make,
    "one prototype after the other wins all images",
    kind="prototype_collapse",
    setting="centres",
    healthy=True,
    sick=False,
    layers=("prototypes*", "teacher.1*", "teacher"),
    family="joint embedding",
    claims=("complete_collapse", "partial_collapse"),
)
