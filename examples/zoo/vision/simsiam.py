"""Partial collapse: SimSiam whose targets are trained too, with a normalization that keeps every feature spread."""

from torch import Tensor, nn

from examples.zoo.specimen import Habitat, Specimen

from .parts import Learner, conv_net, digit_images, projector, recall, self_supervised, two_views


class SimSiam(Learner):
    """An encoder, a projector, and a predictor of what the projector makes of another view.

    Args:
        stops: Whether targets are constants, as they should be.
    """

    def __init__(self, stops: bool) -> None:
        super().__init__(rate=0.05, momentum=0.9, decay=1e-4)
        self.stops = stops
        self.encoder = conv_net()
        self.projector = projector(64, 64, 64, last_norm=True)
        self.predictor = projector(64, 32, 64)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Minus the cosine between prediction and target, both ways."""
        first, second = (self.projector(self.encoder(view)) for view in two_views(batch[0]))
        return (self._loss(first, second) + self._loss(second, first)) / 2

    def _loss(self, source: Tensor, target: Tensor) -> Tensor:
        target = target.detach() if self.stops else target
        return -nn.functional.cosine_similarity(self.predictor(source), target).mean()


def make(seed: int, stops: bool) -> Habitat:
    """Digits without labels."""
    data, model = digit_images(seed), SimSiam(stops)
    embed = nn.Sequential(model.encoder, model.projector)
    return self_supervised(model, seed, model.projector, lambda _: recall(embed, data[2]))


SPECIMEN = Specimen(
    "SimSiam without stop-gradient",
    make,
    "both branches learn to agree in a few directions, and BatchNorm keeps their spread",
    kind="dimensional_collapse",
    setting="stops",
    healthy=True,
    sick=False,
    layers=("projector*", "predictor*"),
    family="joint embedding",
    claims=("partial_collapse",),
)
