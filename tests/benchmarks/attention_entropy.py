"""Attention entropy against one forward pass of fused attention, and the share of training its monitor takes.

Functions in turn, in one process on one thread, as ratios of processor time: exact, and 16 queries of each sequence.
Budgets at n >= 1024: 1.15 and 0.25; the exact form with a mask that is added, against fused attention with that mask:
1.4. Then one fit in which every second step ends in a point of the monitor: what such a
step takes longer than its neighbors, as a share of the 50 steps between two points at the default cadence. Budget: 1 %.

Run: ``python -m tests.benchmarks.attention_entropy``.
"""

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader

from lightning_collapse import AttentionEntropyMonitor
from lightning_collapse.functional import attention_entropy
from tests.benchmarks.models import Endless, Transformer

ROUNDS = {1024: 40, 2048: 12}
CADENCE = 50  # the trainer's default `log_every_n_steps`


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def later(length: int) -> Tensor:
    """Which keys come after which query."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "full": lambda n: {},
    "causal": lambda n: {"is_causal": True},
    "boolean": lambda n: {"attn_mask": ~later(n)},
    "added -inf (n, n)": lambda n: {"attn_mask": torch.zeros(n, n).masked_fill(later(n), -torch.inf)},
    "added -1e9 (n, n)": lambda n: {"attn_mask": torch.zeros(n, n).masked_fill(later(n), -1e9)},
    "added padding (B, 1, 1, n)": lambda n: {"attn_mask": torch.zeros(2, 1, 1, n).index_fill(3, torch.arange(9), -1e9)},
    "bias (1, H, n, n)": lambda n: {"attn_mask": torch.randn(1, 8, n, n)},
    "bias (B, H, n, n)": lambda n: {"attn_mask": torch.randn(2, 8, n, n)},
}


def against_fused_attention(length: int, mask: str) -> None:
    """Print the ratios of the sums over rounds, with the standard error over rounds."""
    query, key, value = torch.randn(3, 2, 8, length, 64)
    options = MASKS[mask](length)
    calls: list[Callable[[], Any]] = [
        lambda: scaled_dot_product_attention(query, key, value, **options),
        lambda: attention_entropy(query, key, **options),
        lambda: attention_entropy(query, key, **options, rows=16),
    ]
    exact, few = calls[1](), calls[2]()
    distance = ((few.normalized - exact.normalized).abs() / few.standard_error).max().item()
    error = (few.normalized / exact.normalized - 1).abs().max().item()
    rounds = [[seconds(call) for call in calls] for _ in range(ROUNDS[length] + 1)][1:]
    base, *ours = ([each[i] for each in rounds] for i in range(3))
    ratios = [sum(times) / sum(base) for times in ours]
    spread = [statistics.stdev(times) / statistics.mean(base) / len(base) ** 0.5 for times in ours]
    print(
        f"{length:5d} {mask:>26} {1000 * statistics.mean(base):9.1f} ms"
        f" {ratios[0]:8.3f} +- {spread[0]:.3f} {ratios[1]:8.3f} +- {spread[1]:.3f}"
        f" {100 * error:7.2f} % {distance:7.2f}"
    )


class Clock(Callback):
    """Marks the start of every batch: one lasts to the next, its point included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.marks.append(time.process_time())


def share_of_training(steps: int) -> None:
    """Print what a step with a point takes longer than the steps around it."""
    torch.manual_seed(0)
    batch = torch.randint(100, (128, 16)), torch.randint(100, (128, 16))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=TensorBoardLogger(folder),
            callbacks=[clock, AttentionEntropyMonitor(every_n_steps=2)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Transformer(), DataLoader(Endless(batch), batch_size=None))
    times = [end - start for start, end in zip(clock.marks[10:], clock.marks[11:], strict=False)]
    plain, watched = times[::2], times[1::2]  # a point after steps 1, 3, 5 ...
    extra = [2 * w - a - b for a, w, b in zip(plain, watched, plain[1:], strict=False)]
    cost, error = statistics.mean(extra) / 2, statistics.stdev(extra) / 2 / len(extra) ** 0.5
    step = statistics.mean(plain)
    share, spread = (100 * each / (CADENCE * step) for each in (cost, error))
    print(
        f"AttentionEntropyMonitor(): {1000 * cost:.2f} +- {1000 * error:.2f} ms per point, a step takes"
        f" {1000 * step:.1f} ms: {share:.3f} +- {spread:.3f} % of training"
    )


def main() -> None:
    """Print all."""
    torch.manual_seed(0)
    print(
        "    n                       mask  fused attention  exact           16 queries      error   in standard errors"
    )
    for length in ROUNDS:
        for mask in MASKS:
            against_fused_attention(length, mask)
    share_of_training(400)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
