"""Below Lightning's Trainer: the engine of the monitors and the judge in a loop that Lightning Fabric runs.

Run: ``python examples/fabric_loop.py``
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.monitoring import FeatureWindow, read_points
from lightning_collapse.rules import Judge, Task, Verdict
from lightning_collapse.utilities import default_taps


class Pulled(nn.Module):
    """An encoder whose two noisy views are pulled together, and nothing holds them apart: it must collapse."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, images: Tensor) -> Tensor:
        """Squared distance between the views."""
        views = self.encoder(torch.cat([images, images]) + 0.1 * torch.randn(2 * len(images), 64))
        first, second = views.chunk(2)
        loss: Tensor = (first - second).square().sum(dim=1).mean()
        return loss


def train(module: nn.Module, steps: int, every: int = 10) -> list[Verdict]:
    """Train, and judge a point at every tenth step."""
    fabric = Fabric(accelerator="cpu")
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(images), batch_size=128, shuffle=True, drop_last=True))
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
    window, judge = FeatureWindow(module, default_taps(module), fabric.device, rows=256), Judge()
    judge.planned, step = steps // every, 0
    while step < steps:
        for (batch,) in loader:
            step += 1
            left = -step % every  # batches before the next point
            window.before_batch(batch, left)
            loss = model(batch)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            window.after_batch(left, every)
            if left == 0:
                judge.update(read_points(window.features(), step), Task("self-supervised"))
    window.close()
    return judge.verdicts


def main(steps: int = 200) -> None:
    """Train, and say what was found."""
    torch.manual_seed(0)
    verdicts = train(Pulled(), steps)
    for verdict in verdicts:
        print(f"- {verdict}")
    print(f"After {steps} steps the judge gave {len(verdicts)} verdicts.")


if __name__ == "__main__":
    main()
