"""Regression over-compression: weight decay takes directions from the features that the targets need."""

from torch import Tensor, nn

from lightning_collapse import CollapseMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor

from .material import Learner, diabetes, explained, loader, mlp
from .specimen import Habitat, Specimen


class Regressor(Learner):
    """A deep ReLU network."""

    def __init__(self, decay: float) -> None:
        super().__init__(rate=0.1, momentum=0.9, decay=decay)
        self.body, self.head = mlp(8, 64, 64, 64), nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions."""
        outputs: Tensor = self.head(self.body(inputs).relu())
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs), targets)


def make(seed: int, decay: float) -> Habitat:
    """Three measures of diabetes patients from eight others."""
    inputs, targets, test, of_test = diabetes(seed)
    model = Regressor(decay)
    return Habitat(
        model,
        [loader(inputs, targets, size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor()],
        steps=600,
        every=10,
        embedding=model.body,
        held_out=lambda: explained(model, test, of_test),
    )


SPECIMEN = Specimen(
    "heavy weight decay",
    make,
    "features of a regression take fewer dimensions than the targets",
    kind="regression_over_compression",
    setting="decay",
    healthy=0.0,
    sick=0.03,
    layers=("head*", "body*"),
    claims=("dimensional_collapse",),
    family="table",
)
