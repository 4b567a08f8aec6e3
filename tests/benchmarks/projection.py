"""What keeping old tasks costs in a step of a later one: projecting its update, and keeping rows.

Fits beside a bare one, block by block, see ``tests.benchmarks.interleaved``, on multilayer perceptrons of equal widths:
(a) ``Projection`` with as many protected directions in every layer as each line says. The floor below it is the share
of multiplications alone: ``4 k`` for each number of a weight, where the step takes 6 for each row. It is below 5 % from
``13.3 k`` rows (or tokens, or patches) of a batch on, whatever the width. What stands above are copies: the weights
before the step, and the update.
(b) ``Replay`` that keeps rows of every batch in a buffer of 1000, and rehearses none.

Run: ``python -m tests.benchmarks.projection``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_collapse import Projection, Replay
from lightning_collapse.projections import InputSubspace, Subspace
from lightning_collapse.replay import ReplayBuffer
from tests.benchmarks import monitor_overhead
from tests.benchmarks.interleaved import ratios
from tests.benchmarks.models import Endless

SHAPES = ((3, 256, 64, 16), (3, 256, 256, 16), (4, 1024, 256, 32), (4, 1024, 512, 32))
"""Layers, their width, rows of a batch, protected directions."""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, 1e-3),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 1e-5),
}


class Directions(InputSubspace):
    """So many directions of every layer, whatever its inputs are: a step costs the same."""

    def __init__(self, number: int) -> None:
        super().__init__(n_samples=16)
        self.number = number

    def grow(self, second_moment: Tensor, known: Subspace) -> Subspace:
        """Random ones, once."""
        if known.importance.numel():
            return known
        basis = torch.linalg.qr(second_moment.new_empty(len(second_moment), self.number).normal_())[0]
        return Subspace(basis, torch.ones_like(basis[0]))


class Wide(LightningModule):
    """Layers of one width, with the squared error."""

    def __init__(self, layers: int, width: int, optimizer: str) -> None:
        super().__init__()
        self.net = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())])
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def second_task(model: LightningModule, batch: Tensor, number: int) -> Projection:
    """One that has learned a task."""
    method = Directions(number)
    method.start(model)
    method.learn(model, [batch])
    method.release()
    return Projection(method)


def keeping() -> Sequence[Callback]:
    """A buffer that takes rows and gives none."""
    return [Replay(ReplayBuffer(1000), batch_size=0)]


def main(shapes: Sequence[tuple[int, int, int, int]] = SHAPES, floats: int = 2**27, blocks: int = 20) -> None:
    """Print a line for every shape and optimizer; a block multiplies so many numbers of weights by a row."""
    for layers, width, rows, number in shapes:
        data = Endless(*[(torch.randn(rows, width), torch.randn(rows, width)) for _ in range(4)])
        block = max(1, floats // (layers * width**2 * rows))
        for optimizer in OPTIMIZERS:

            def model(layers: int = layers, width: int = width, optimizer: str = optimizer) -> LightningModule:
                return Wide(layers, width, optimizer)

            def projecting(model: Any = model, data: Any = data, number: int = number) -> Sequence[Callback]:
                return [second_task(model(), data.batches[0][0], number)]

            found = ratios(model, data, projecting, block, blocks, logs=False)
            shape = f"{layers} x {width}, {rows} rows, {number} directions, {optimizer}"
            print(f"Projection, {shape}: {found}, floor {1 + 4 * number / 6 / rows:.3f}", flush=True)
            if (layers, width, rows, number) == shapes[0]:
                found = ratios(model, data, keeping, block, blocks, logs=False)
                print(f"Replay that only keeps, {layers} x {width}, {rows} rows, {optimizer}: {found}", flush=True)


if __name__ == "__main__":
    monitor_overhead.quiet()
    main()
