"""When does pruning cut a layer through? SAP, which asks the PQ index of each layer, beside fixed shares, on digits.

An MLP is trained, pruned and trained on, round by round. SAP prunes each layer by the PQ index of the weights that it
has left; "global" and "by layer" prune a fifth of what is left per round, the smallest of all layers together, or of
each. Run: ``python examples/dynamics/pruning.py`` (two minutes on a core; with ``--quick`` a few rounds).
"""

import argparse
import logging
import statistics
import warnings
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, WeightSpectrumMonitor
from lightning_collapse.functional import pq_index
from lightning_collapse.functional.weights import sap_keep_count

WIDTH, CLASSES, HELD_OUT, BATCH, EPOCHS, SHARE = 128, 10, 360, 64, 3, 0.2
KINDS = ("SAP", "global", "by layer")


class Classifier(LightningModule):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, WIDTH, WIDTH, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        scores: Tensor = self.layers[-1](x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Pruning(Callback):
    """Every three epochs: what is left and how good it is; then it prunes."""

    def __init__(self, kind: str, images: Tensor, labels: Tensor) -> None:
        self.kind, self.images, self.labels = kind, images, labels
        self.rounds: list[dict[str, float]] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and prune where it is due."""
        assert isinstance(pl_module, Classifier)
        if (trainer.current_epoch + 1) % EPOCHS:
            return
        layers: list[Any] = list(pl_module.layers)
        left = [layer.weight[layer.weight != 0] for layer in layers]
        total = sum(layer.weight.numel() for layer in layers)
        self.rounds.append(
            {
                "left": sum(map(len, left)) / total,
                "accuracy": (pl_module(self.images).argmax(dim=1) == self.labels).float().mean().item(),
                "index": pq_index(torch.cat(left)).item(),
                "least": min(len(w) / layer.out_features for w, layer in zip(left, layers, strict=True)),
            }
        )
        sizes = [w.abs().sort().values for w in left]
        if self.kind == "SAP":
            lines = [size[len(size) - int(sap_keep_count(size))] if len(size) else 0.0 for size in sizes]
        elif self.kind == "by layer":
            lines = [size[int(SHARE * len(size))] if len(size) else 0.0 for size in sizes]
        else:
            together = torch.cat(sizes).sort().values
            lines = [together[int(SHARE * len(together))]] * len(layers)
        for layer, line in zip(layers, lines, strict=True):
            mask = (layer.weight != 0) & (layer.weight.abs() >= line)
            prune.custom_from_mask(layer, "weight", mask)  # type: ignore[no-untyped-call]


def run(kind: str, seed: int, rounds: int) -> tuple[list[dict[str, float]], str, int]:
    """Rounds of a run, in which of them which layer was said to have collapsed, and its steps."""
    seed_everything(seed, verbose=False)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float() / 16, labels[order]
    loader = DataLoader(TensorDataset(images[HELD_OUT:], labels[HELD_OUT:]), batch_size=BATCH, shuffle=True)
    pruning = Pruning(kind, images[:HELD_OUT], labels[:HELD_OUT])
    every = EPOCHS * len(loader) // 3
    monitor = WeightSpectrumMonitor(measures=["weights_per_unit", "pq_index"], updates=False, every_n_steps=every)
    guard = CollapseGuard(rules=["layer_collapse"], action="log")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=rounds * EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning, monitor, guard],
    )
    trainer.fit(Classifier(), loader)
    said = [f"{v.layer} in round {v.since // (EPOCHS * len(loader))}" for v in guard.judge.verdicts]
    return pruning.rounds, ", ".join(said) or "nothing", trainer.global_step


def main() -> None:
    """Print a table: rows are rounds, numbers means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few rounds")
    quick = parser.parse_args().quick
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seeds, rounds, shown = ((0,), 2, (0, 1)) if quick else ((0, 1, 2), 26, (0, 5, 10, 15, 20, 25))
    print("| pruning | round | weights left | held-out accuracy | PQ index of what is left | fewest per unit |")
    print("|---|---|---|---|---|---|")
    verdicts = []
    for kind in KINDS:
        runs = [run(kind, seed, rounds) for seed in seeds]
        for i in shown:
            of = {key: [found[i][key] for found, *_ in runs] for key in runs[0][0][0]}
            mean = {key: statistics.mean(values) for key, values in of.items()}
            spread = max(of["accuracy"]) - min(of["accuracy"])
            print(
                f"| {kind} | {i} | {100 * mean['left']:.3g} % | {100 * mean['accuracy']:.1f} ({100 * spread:.1f}) |"
                f" {mean['index']:.3f} | {mean['least']:.2g} |"
            )
        verdicts += [f"{kind}, seed {seed}: {said}" for seed, (_, said, _) in zip(seeds, runs, strict=True)]
    print(f"\nAfter {runs[0][2]} steps layer collapse had been said of: {'; '.join(verdicts)}.")


if __name__ == "__main__":
    main()
