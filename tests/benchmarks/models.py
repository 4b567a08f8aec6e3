"""What benchmarks fit: two networks, and data without an end."""

from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import IterableDataset


class Endless(IterableDataset[Any]):
    """The same batches for ever: an epoch that ends would cost the block it ends in."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return cycle(self.batches)


class MLP(LightningModule):
    """Four hidden layers of 256, with cross entropy; with one output the squared error."""

    def __init__(self, inputs: int = 784, outputs: int = 10) -> None:
        super().__init__()
        sizes = [inputs, 256, 256, 256, 256]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, outputs))
        self.loss = nn.functional.mse_loss if outputs == 1 else nn.functional.cross_entropy

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class Transformer(LightningModule):
    """Four layers of width 128 on 128 sequences of 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 128)
        block = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 100)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.encoder(self.embed(x))).flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def digits(regression: bool = False) -> Endless:
    """Whole batches of 128 of scikit-learn's digits."""
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    targets = labels.unsqueeze(1).float() if regression else labels
    return Endless(*zip(images.split(128)[:-1], targets.split(128)[:-1], strict=True))
