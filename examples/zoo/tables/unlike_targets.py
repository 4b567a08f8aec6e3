"""Regression of targets of unlike size: features serve the largest one alone."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, explained, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, RegressionCollapseMonitor, SpectralAlignmentMonitor

ROWS, INPUTS, STEPS = 1200, 10, 600
SIZES = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def table(seed: int) -> tuple[Tensor, Tensor]:
    """Rows ``(N, 10)`` and six smooth functions of them, the first of which is measured in a small unit."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, INPUTS, generator=generator)
    directions = torch.randn(INPUTS, len(SIZES), generator=generator) / INPUTS**0.5
    targets = (1.5 * inputs @ directions).sin() + 0.5 * inputs @ directions.roll(1, dims=0)
    return inputs, (targets - targets.mean(dim=0)) / targets.std(dim=0) * SIZES


class Multitarget(Learner):
    """A network with SiLU and weight decay, as for all targets at once."""

    def __init__(self) -> None:
        super().__init__(rate=2e-3, decay=0.1)
        self.body = nn.Sequential(nn.Linear(INPUTS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 48))
        self.head = nn.Linear(48, len(SIZES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions."""
        outputs: Tensor = self.head(nn.functional.silu(self.body(inputs)))
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def make(seed: int, standardized: bool) -> Habitat:
    """Explained is the variance of all targets but the large one."""
    inputs, targets = table(seed)
    targets = targets / SIZES if standardized else targets
    rows, test, model = slice(300, None), slice(300), Multitarget()
    small = nn.Sequential(model, _Small())
    return Habitat(
        model,
        [loader(inputs[rows], targets[rows], size=64, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), RegressionCollapseMonitor()],
        steps=STEPS,
        every=10,
        embedding=model.body,
        held_out=lambda: explained(small, inputs[test], targets[test, 1:]),
    )


class _Small(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        """All but the first."""
        return outputs[:, 1:]


SPECIMENS = (
    Specimen(
        "targets of unlike size",
        make,
        "features serve the target with the largest numbers alone",
        kind="dimensional_collapse",
        setting="standardized",
        healthy=True,
        sick=False,
        claims=("regression_over_compression",),
        family="table",
    ),
)
