"""Does every layer of a deep network sort the classes a bit more? A deep linear network, and one with ReLUs.

Run: ``python examples/heads/linear_depth.py`` (a minute on one core; with ``--quick`` one short run each).
"""

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from small_digits import Rows, is_quick, split
from small_digits import said as median_and_range
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot
from torch.utils.data import DataLoader

from lightning_collapse import LabelledGeometryMonitor

DEPTH, WIDTH, PER_CLASS, RATE = 8, 64, 6, 0.05
BODIES = {"linear": nn.Identity, "ReLU": nn.ReLU}
GAINS = {nn.Identity: 0.5, nn.ReLU: 2**0.5}
"""Of the orthogonal matrices: small ones leave it to training which directions grow."""


class Deep(LightningModule):
    """Layers without biases that begin as scaled orthogonal matrices, as the theory has them."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        layers = []
        for _ in range(DEPTH):
            layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), activation()))
            nn.init.orthogonal_(layers[-1][0].weight, GAINS[activation])  # type: ignore[arg-type]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 10, bias=False)

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        """The squared error, of all rows at once."""
        targets = one_hot(batch[1], 10) - 0.1  # of mean zero, as the images are
        return mse_loss(self.head(self.layers(batch[0])), targets, reduction="sum") / 10

    def configure_optimizers(self) -> Any:
        """Gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=RATE)


def small(seed: int) -> Rows:
    """Six images of each digit, centered: fewer than pixels, so that a linear map can send classes to points."""
    rows, _ = split(seed)
    picked = torch.cat([(rows.digits == digit).nonzero().flatten()[:PER_CLASS] for digit in range(10)])
    images = rows.images[picked]
    return Rows(nn.functional.normalize(images - images.mean(dim=0)), rows.digits[picked])


def learn(body: str, seed: int, steps: int) -> dict[str, list[float]]:
    """Scatter within over scatter between classes, behind every layer, at the first step and at the last."""
    torch.manual_seed(seed)
    model, found = Deep(BODIES[body]), {}
    for name, many in (("start", 1), ("end", steps)):
        monitor = LabelledGeometryMonitor(["layers.?"], lambda batch: batch[1], every_n_steps=many, rows=10 * PER_CLASS)
        batches: Any = [small(seed)] * many
        trainer = Trainer(
            accelerator="cpu",
            max_steps=many,
            max_epochs=-1,
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
        curves = trainer.callback_metrics
        shares = [curves[f"labelled_geometry/layers.{i}/between_share"].item() for i in range(DEPTH)]
        found[name] = [1 / share - 1 for share in shares]
        found[f"{name}, loss"] = [model.training_step(small(seed), 0).item()]
    return found


def main(steps: int = 4000, seeds: int = 3) -> None:
    """Train all and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    heads = [f"layer {i + 1}" for i in range(DEPTH)]
    lines = [f"| network | when | {' | '.join(heads)} | loss |", "|---" * (DEPTH + 3) + "|"]
    for body in BODIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on loaders
            runs = [learn(body, seed, steps) for seed in range(seeds)]
        for when in ("start", "end"):
            cells = [median_and_range(run[when][i] for run in runs) for i in range(DEPTH)]
            loss = median_and_range(run[f"{when}, loss"][0] for run in runs)
            lines.append(f"| {body} | {when} | {' | '.join(cells)} | {loss} |")
    print("\n".join(lines))
    print(f"\nAfter {steps} steps the scatter within classes over that between them is, layer by layer, as above.")


if __name__ == "__main__":
    main(*((3, 1) if is_quick(__doc__) else ()))
