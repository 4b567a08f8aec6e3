"""A module that collapses, saved by one callback and not one changed line.

Run: ``python examples/regularize_without_code.py``
"""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseMonitor, Regularizer
from lightning_collapse.losses import VICReg


class Agreement(LightningModule):
    """Two noisy views of a digit must get one embedding: perfectly solved by one embedding for every digit."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean squared distance of the two embeddings."""
        first, second = (self.projector(batch[0] + 0.3 * torch.randn_like(batch[0])) for _ in range(2))
        return nn.functional.mse_loss(first, second)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def spread(regularizers: list[Regularizer], steps: int) -> float:
    """Feature standard deviation of the embeddings after training."""
    seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=20,
        logger=False,
        callbacks=[CollapseMonitor(layers=["projector"]), *regularizers],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Agreement(), DataLoader(TensorDataset(images), batch_size=256, shuffle=True, drop_last=True))
    return trainer.callback_metrics["collapse/projector/feature_std"].item()


def main(steps: int = 300) -> None:
    """Train without and with the callback, and say what was seen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    without = spread([], steps)
    regularized = spread([Regularizer(VICReg(), layer="projector")], steps)
    print(f"After {steps} steps the embeddings' std is {without:.1e} without and {regularized:.2f} with it.")


if __name__ == "__main__":
    main()
