"""What watching costs: ratios of the time of watched and bare fits, side by side in one process.

Rows are monitors at their defaults, alone, with a guard and all together, on a perceptron, on scikit-learn's digits (a
small network of 3 ms a step, where nothing hides) and on a transformer; three cheap monitors at every step; and a
compiled transformer between points, with the number of its graphs. See ``tests.benchmarks.interleaved``.

Run: ``python -m tests.benchmarks.monitor_overhead [ROW ...] [--quick] [--device cuda]``.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import IterableDataset

from examples.zoo.generative.codebook import VQVAE
from examples.zoo.generative.latents import VAE
from examples.zoo.generative.quantizer import Codebook
from lightning_collapse import (
    CodebookMonitor,
    CollapseGuard,
    CollapseMonitor,
    DriftMonitor,
    FeatureLearningMonitor,
    GradientMonitor,
    IntrinsicDimensionMonitor,
    LatentMonitor,
    NeuralCollapseMonitor,
    RegressionCollapseMonitor,
    SpectralAlignmentMonitor,
    StabilityMonitor,
    TokenMonitor,
)
from tests.benchmarks.interleaved import Ratios, ratios
from tests.benchmarks.models import MLP, Endless, Transformer, digits
from tests.monitors import MONITORS, make

NOT_FOR_CLASSES = ("RegressionCollapseMonitor",)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: What is watched by what.
        goal: The ratio that it must not pass.
        block: Optimizer steps of a block; 50 hold one point of the default cadence.
        blocks: Of each side.
    """

    title: str
    goal: float
    model: Callable[[], LightningModule]
    data: Callable[[], IterableDataset[Any]]
    watchers: Callable[[], Sequence[Callback]]
    block: int = 50
    blocks: int = 30
    logs: bool = True


def perceptron_data() -> Endless:
    """Noise with labels."""
    return Endless((torch.randn(128, 784), torch.randint(10, (128,))))


def tokens(sequences: int = 128, length: int = 16) -> Endless:
    """Random tokens with targets."""
    return Endless((torch.randint(100, (sequences, length)), torch.randint(100, (sequences, length))))


def guarded() -> list[Callback]:
    """The two that the first lines of the documentation show."""
    return [CollapseMonitor(), CollapseGuard()]


def everything(*left_out: str) -> list[Callback]:
    """Every monitor at its defaults, and a guard."""
    return [*(make(name) for name in MONITORS if name not in left_out), CollapseGuard()]


def every_step() -> list[Callback]:
    """What is cheap enough for a point at every step."""
    ratio = CollapseMonitor(measures=["participation_ratio"], every_n_steps=1)
    return [SpectralAlignmentMonitor(every_n_steps=1), GradientMonitor(noise=False, every_n_steps=1), ratio]


class Compiled(Transformer):
    """A transformer whose layers run as compiled code; counts its graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = 0

    def configure_model(self) -> None:
        if not isinstance(self.encoder, torch._dynamo.OptimizedModule):
            self.encoder = torch.compile(self.encoder, backend=self.backend)  # type: ignore[assignment]

    def backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("inductor" if inputs[0].is_cuda else "eager")(graph, inputs)


ROWS = {
    "mlp": Row("CollapseMonitor, MLP 784-256x4-10", 1.02, MLP, perceptron_data, lambda: [CollapseMonitor()]),
    "transformer": Row(
        "CollapseMonitor, transformer", 1.005, Transformer, tokens, lambda: [CollapseMonitor()], blocks=3
    ),
    "guarded mlp": Row("collapse monitor and guard, MLP 784-256x4-10", 1.02, MLP, perceptron_data, guarded),
    "guarded transformer": Row(
        "collapse monitor and guard, transformer", 1.005, Transformer, tokens, guarded, blocks=3
    ),
    "id": Row(
        "IntrinsicDimensionMonitor, digits MLP", 1.04, lambda: MLP(64), digits, lambda: [IntrinsicDimensionMonitor()]
    ),
    "digits": Row("collapse monitor and guard, digits MLP", 1.03, lambda: MLP(64), digits, guarded, blocks=40),
    "all transformer": Row(
        "all monitors, transformer", 1.03, Transformer, tokens, lambda: everything(*NOT_FOR_CLASSES), blocks=3
    ),
    "all digits": Row(
        "all monitors, digits MLP", 1.15, lambda: MLP(64), digits, lambda: everything(*NOT_FOR_CLASSES), blocks=40
    ),
    "nrc": Row(
        "RegressionCollapseMonitor, digits MLP",
        1.03,
        lambda: MLP(64, 1),
        lambda: digits(regression=True),
        lambda: [RegressionCollapseMonitor()],
        blocks=40,
    ),
    "nc": Row("NeuralCollapseMonitor, digits MLP", 1.03, lambda: MLP(64), digits, lambda: [NeuralCollapseMonitor()]),
    "every step": Row(
        "three cheap monitors at every step, 2048 tokens", 1.04, Transformer, tokens, every_step, 1, 40, logs=False
    ),
    "tokens": Row(
        "TokenMonitor at every step, transformer: a fiftieth of what is above 1 at its default cadence",
        1.5,
        Transformer,
        tokens,
        lambda: [TokenMonitor(every_n_steps=1)],
        block=1,
        blocks=30,
        logs=False,
    ),
    "drift": Row(
        "DriftMonitor at every step, transformer: a five-hundredth of what is above 1 at its default cadence",
        5.0,
        Transformer,
        tokens,
        lambda: [DriftMonitor(every_n_steps=1)],
        block=1,
        blocks=30,
        logs=False,
    ),
    "feature learning": Row(
        "FeatureLearningMonitor at every step, transformer: 1/150 of what is above 1 at its default cadence",
        2.5,
        Transformer,
        tokens,
        lambda: [FeatureLearningMonitor(every_n_steps=1)],
        block=1,
        blocks=30,
        logs=False,
    ),
    "codebook": Row(
        "CodebookMonitor, small VQ-VAE",
        1.01,
        lambda: VQVAE(Codebook(restarts=False)),
        lambda: Endless((torch.rand(64, 1, 8, 8),)),
        lambda: [CodebookMonitor()],
    ),
    "latents": Row(
        "LatentMonitor at every step, VAE 784-400-20: a fiftieth of what is above 1 at its default cadence",
        1.5,
        lambda: VAE(hidden=(400,), inputs=784),
        lambda: Endless((torch.rand(128, 784),)),
        lambda: [LatentMonitor(every_n_steps=1)],
        block=1,
        blocks=100,
        logs=False,
    ),
    "stability": Row(
        "StabilityMonitor, transformer", 1.005, Transformer, tokens, lambda: [StabilityMonitor()], block=10, blocks=20
    ),
    "compiled": Row(
        "compiled transformer between points", 1.01, Compiled, tokens, lambda: [CollapseMonitor(every_n_steps=999)], 4
    ),
}


def graphs(device: str = "cpu") -> int:
    """Graphs of a compiled transformer over a watched fit with points."""
    torch._dynamo.reset()
    model = Compiled()
    options: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    data = torch.utils.data.DataLoader(tokens(4), batch_size=None)
    kind = "gpu" if device == "cuda" else "cpu"
    Trainer(**options, accelerator=kind, max_steps=9, callbacks=[CollapseMonitor(every_n_steps=3)]).fit(model, data)
    return model.graphs


def measure(row: Row, device: str = "cpu", quick: bool = False) -> Ratios:
    """The ratios of a row; ``quick`` only shows that it runs."""
    torch.manual_seed(0)
    block, blocks = (min(row.block, 2), 2) if quick else (row.block, row.blocks)
    return ratios(row.model, row.data(), row.watchers, block, blocks, device, row.logs)


def main() -> None:
    """Print one line per row, with its goal."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.monitor_overhead")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="show that it runs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    for name in given.rows or ROWS:
        start = time.monotonic()
        found = measure(ROWS[name], given.device, given.quick)
        took = f"took {time.monotonic() - start:.0f} s"
        print(f"{ROWS[name].title}: {found} (goal {ROWS[name].goal}, {took})", flush=True)
    if not given.rows or "compiled" in given.rows:
        print(f"compiled transformer, watched: {graphs(given.device)} graphs (goal 1)")


def quiet() -> None:
    """One thread, and no word of Lightning's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    quiet()
    main()
