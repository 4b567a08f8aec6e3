"""Are networks that begin at weights of low rank richer? A perceptron reads digits from four ranks of one hidden layer.

Run: ``python examples/dynamics/rich_or_lazy.py`` (a minute on one core; ``--quick``: one short run each).
"""

import argparse
import logging
import statistics
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import FeatureLearningMonitor
from lightning_collapse.functional.feature_learning import low_rank_weight
from lightning_collapse.utilities import Point

WIDTH, RANKS, BATCH, TRAIN = 200, (1, 10, 50, 200), 100, 1200
MEASURES = ("weight_change", "representation_alignment", "kernel_alignment", "sign_similarity")


class Perceptron(LightningModule):
    """Two hidden layers; the second one begins at a rank, and always at the same norm."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        nn.init.normal_(self.hidden.weight, std=WIDTH**-0.5)
        self.hidden.weight.data = low_rank_weight(self.hidden.weight.data, rank)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.hidden(self.first(x).relu()).relu())
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As published: momentum, no weight decay."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Points(Callback):
    """Keeps the last point of each measure."""

    def __init__(self) -> None:
        self.last: dict[str, Point] = {}

    def on_points(self, trainer: Trainer, pl_module: LightningModule, points: list[Point]) -> None:
        """Called by monitors."""
        self.last |= {point.measure: point for point in points}


def train(rank: int, seed: int, steps: int, data: TensorDataset) -> dict[str, float]:
    """Held-out accuracy, and what the monitor said of the hidden layer last; nulls under ``... null``."""
    torch.manual_seed(seed)
    model, monitor = Perceptron(rank), FeatureLearningMonitor(["hidden"], every_n_steps=steps)
    keeper = Points()
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    loader = DataLoader(TensorDataset(*data[:TRAIN]), BATCH, shuffle=True)
    Trainer(accelerator="cpu", max_steps=steps, callbacks=[monitor, keeper], **options).fit(model, loader)  # type: ignore[arg-type]
    x, y = data[TRAIN:]
    nulls = {f"{name} null": point.null for name, point in keeper.last.items()}
    found = {name: keeper.last[name].value for name in MEASURES} | nulls
    return found | {"accuracy": (model.eval()(x).argmax(dim=1) == y).float().mean().item()}


def main(steps: int = 600, seeds: int = 3) -> None:
    """Train all and print the table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order])
    head = ["rank", *(name.replace("_", " ") for name in MEASURES), "held-out accuracy"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders
        for rank in RANKS:
            runs = [train(rank, seed, steps, data) for seed in range(seeds)]
            cells = [f"{rank}"]
            for name in (*MEASURES, "accuracy"):
                values = sorted(run[name] for run in runs)
                null = statistics.median(run.get(f"{name} null", torch.nan) for run in runs)
                beside = "" if null != null else f", null {null:.2f}"
                cells.append(f"{statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f}){beside}")
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nAfter {steps} steps: the lower an alignment, the richer the training.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps: to see that it runs")
    main(*((4, 1) if parser.parse_args().quick else ()))
