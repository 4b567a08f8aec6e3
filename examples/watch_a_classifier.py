"""One line in a Trainer: watch every stage of a convolutional classifier of handwritten digits.

Run: ``python examples/watch_a_classifier.py``
"""

import logging

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, CollapseMonitor


class Classifier(LightningModule):
    """Three convolutions and a linear layer; nothing in it knows that it is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 300) -> None:
    """Train, and say what was seen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=128, shuffle=True)
    guard = CollapseGuard()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=20,
        callbacks=[CollapseMonitor(), guard],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)
    curves = trainer.callback_metrics
    key = "collapse/net.8.input"
    print(
        f"After {trainer.global_step} steps the classifier's input has an effective rank of"
        f" {curves[f'{key}/effective_rank']:.1f} over {curves[f'{key}/n']:.0f} images; the guard gave"
        f" {len(guard.verdicts)} verdicts."
    )


if __name__ == "__main__":
    main()
