"""A healthy autoencoder with a bottleneck of three, on a table with NaN in it."""

import torch
from torch import Tensor

from examples.zoo.material import Learner, loader, mlp
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

from .corrupted_rows import HELD_OUT, cells


class Autoencoder(Learner):
    """A bottleneck of three by design; missing cells are NaN, and their mask keeps them from the loss."""

    def __init__(self) -> None:
        super().__init__(rate=3e-3)
        self.encoder, self.decoder = mlp(60, 64, 3), mlp(3, 64, 30)

    def forward(self, rows: Tensor) -> Tensor:
        """All cells, those that are missing too."""
        there = ~rows.isnan()
        output: Tensor = self.decoder(self.encoder(torch.cat([rows.nan_to_num(), there.float()], dim=1)))
        return output

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Squared error of the cells that are there."""
        rows = batch[0]
        error: Tensor = (self(rows) - rows)[~rows.isnan()].square().mean()
        return error


def missing_cells(seed: int) -> Habitat:
    """A tenth of a table is missing, and three directions are left by design."""
    generator = torch.Generator().manual_seed(seed)
    table = cells()[torch.randperm(len(cells()), generator=generator)]
    missing = torch.rand(table.shape, generator=generator) < 0.1
    rows, test = table.masked_fill(missing, torch.nan)[HELD_OUT:], table[:HELD_OUT]
    model = Autoencoder()
    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    return Habitat(
        model,
        [loader(rows, size=80, seed=seed)],
        monitors,
        steps=600,
        every=15,
        embedding=model.encoder,
        held_out=lambda: 1 - float((model(test) - test).square().mean() / test.var(dim=0).mean()),
    )


SPECIMENS = (Specimen("missing cells", missing_cells, "NaN in the batch, and a bottleneck of three", family="table"),)
