"""A healthy classifier that meets the classes one after the other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import digit_images
from examples.zoo.vision.schedules import classifier, classify


class Curriculum(IterableDataset[tuple[Tensor, Tensor]]):
    """First two digits, then one more every thirty batches, then all."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels, self.seed = images, labels, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, step = torch.Generator().manual_seed(self.seed), 0
        while True:
            known = (self.labels < 2 + step // 30).nonzero().squeeze(1)
            rows = known[torch.randint(len(known), (64,), generator=generator)]
            yield self.images[rows], self.labels[rows]
            step += 1


def make(seed: int) -> Habitat:
    """One class after the other."""
    data = digit_images(seed)
    batches: Any = DataLoader(Curriculum(*data[:2], seed), batch_size=None)
    return classify(data, classifier("group"), batches)


SPECIMEN = Specimen("curriculum", make, "few classes at first", family="convolutional classifier")
