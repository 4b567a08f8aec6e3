"""A healthy run that looks ill at first: self-supervised learning whose terms against collapse begin late."""

from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import Learner, conv_net, digit_images, projector, recall, self_supervised, two_views
from lightning_collapse.losses import vicreg_terms


class Ramped(Learner):
    """VICReg whose terms against collapse begin after thirty steps and have their full weight after ninety."""

    def __init__(self) -> None:
        super().__init__(rate=5e-3)
        self.encoder, self.projector = conv_net(norm="group"), projector(64, 128, 64)
        last = nn.Linear(128, 64)
        nn.init.orthogonal_(last.weight)  # spread out at first
        self.projector[-1] = last

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Agreement first."""
        first, second = (self.projector(self.encoder(view)) for view in two_views(batch[0]))
        terms = vicreg_terms(first, second)
        share = min(max(self.global_step - 30, 0) / 60, 1.0)
        spread = 25 * terms["variance"] + terms["covariance"]
        total: Tensor = 25 * nn.functional.mse_loss(first, second) + share * spread
        return total


def make(seed: int) -> Habitat:
    """Digits without labels."""
    data, model = digit_images(seed), Ramped()
    embed = nn.Sequential(model.encoder, model.projector)
    return self_supervised(model, seed, model.projector, lambda _: recall(embed, data[2]))


SPECIMEN = Specimen("early dip", make, "features fold at first, and recover", family="joint embedding")
