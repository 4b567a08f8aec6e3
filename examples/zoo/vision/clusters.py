"""Prototype collapse: online clustering (SwAV) whose assignments need not be spread evenly over the clusters."""

import torch
from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen

from .parts import Learner, conv_net, digit_images, projector, self_supervised, two_views, usage

PROTOTYPES, TEMPERATURE, SHARPNESS = 48, 0.1, 0.05


class Clusters(Learner):
    """An encoder that predicts to which prototype another view belongs (SwAV, arXiv:2006.09882).

    Args:
        rounds: Of Sinkhorn and Knopp, which spread a batch evenly; with 0 each image chooses for itself.
    """

    def __init__(self, rounds: int) -> None:
        super().__init__(rate=2e-3)
        self.rounds = rounds
        self.encoder, self.projector = conv_net(norm="group"), projector(64, 64, 32)
        self.prototypes = nn.Linear(32, PROTOTYPES, bias=False)

    def scores(self, images: Tensor) -> Tensor:
        """Cosines with prototypes, those not trained for length."""
        return self.prototypes(nn.functional.normalize(self.projector(self.encoder(images)), dim=1))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy with the assignments of the other view."""
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        first, second = (self.scores(view) for view in two_views(batch[0]))
        losses = [
            nn.functional.cross_entropy(scores / TEMPERATURE, self.assign(other.detach()))
            for scores, other in ((first, second), (second, first))
        ]
        return torch.stack(losses).mean()

    def assign(self, scores: Tensor) -> Tensor:
        """Which share of each image belongs to which prototype."""
        share = (scores / SHARPNESS).softmax(dim=1)
        for _ in range(self.rounds):
            share = share / share.sum(dim=0, keepdim=True)
            share = share / share.sum(dim=1, keepdim=True)
        return share


def make(seed: int, rounds: int) -> Habitat:
    """Digits without labels."""
    data, model = digit_images(seed), Clusters(rounds)
    return self_supervised(model, seed, model.projector, lambda m: usage(m.scores(data[2])))


SPECIMEN = Specimen(
    "clusters of any size",
    make,
    "large clusters win all images",
    kind="prototype_collapse",
    setting="rounds",
    healthy=3,
    sick=0,
    layers=("projector*", "prototypes*"),
    family="joint embedding",
    claims=("complete_collapse", "partial_collapse"),
)
