"""A regression on scikit-learn's diabetes data: disease progression, or that and two blood values."""

from functools import cache

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """Inputs ``(442, 7)`` and three targets ``(442, 3)``, standardized."""
    x, y = load_diabetes(return_X_y=True)
    table = torch.tensor(x, dtype=torch.float32)
    targets = torch.cat([torch.tensor(y, dtype=torch.float32).unsqueeze(1), table[:, [4, 8]]], dim=1)
    inputs = table[:, [0, 1, 2, 3, 6, 7, 9]]
    return tuple((t - t.mean(dim=0)) / t.std(dim=0) for t in (inputs, targets))


def loader(targets: int = 3, size: int = 34, rows: slice = slice(None)) -> DataLoader:
    """Batches ``(x, y)`` in a fixed order; 13 of them."""
    x, y = diabetes()
    y = y[rows, 0] if targets == 1 else y[rows, :targets]
    return DataLoader(TensorDataset(x[rows].clone(), y.clone()), batch_size=size)


class Regressor(LightningModule):
    """7 -> 32 -> 16 features, and a head."""

    def __init__(self, targets: int = 3, lr: float = 0.05, decay: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Linear(32, 16))
        self.head = nn.Linear(16, targets)
        self.lr, self.decay = lr, decay

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.head(self.body(x)) - y.view(len(x), -1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.decay)
