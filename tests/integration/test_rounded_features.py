"""Neural collapse behind a LayerNorm, with more classes than features, whatever the precision of the trainer."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import NeuralCollapseMonitor
from tests.toys import fit

CLASSES, DIM, ROWS = 40, 16, 1600


class Normed(LightningModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def training_step(self, batch, batch_idx):
        features, labels = batch
        return nn.functional.cross_entropy(self.head(self.norm(features)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def reading(precision):
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat(ROWS // CLASSES)
    features = torch.randn(CLASSES, DIM)[labels] + 0.5 * torch.randn(ROWS, DIM)
    loader = DataLoader(TensorDataset(features.bfloat16().float(), labels), batch_size=ROWS // 4)
    monitor = NeuralCollapseMonitor(every_n_steps=4, rows=ROWS)
    return fit(Normed(), [monitor], loader, precision=precision).callback_metrics


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_a_null_direction_is_not_inverted(precision):
    expected, found = reading("32-true"), reading(precision)
    for name in ("nc1", "vci", "cdnv"):
        value = found[f"neural_collapse/head.input/{name}"]
        assert value == pytest.approx(float(expected[f"neural_collapse/head.input/{name}"]), rel=0.02), name
        assert value > 0.05
