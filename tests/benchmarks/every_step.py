"""What monitors cost that are cheap enough for every step, and what one warm power step costs beside an exact norm.

(a) Fits of a transformer (four layers of width 128) with a point at every step, beside a bare one, step by step, see
``tests.benchmarks.interleaved``. The runs have no logger, so what loggers write is left out; ``callback_metrics`` and
hooks are in. All of them together also with larger batches: what the monitors do hardly grows with the batch, and a
step does.

(b) One call of ``PowerIteration.step`` on all matrices of that transformer, interleaved with
``torch.linalg.matrix_norm(weight, 2)`` on each of them.

Run: ``python -m tests.benchmarks.every_step``.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from lightning_collapse import CollapseMonitor, GradientMonitor, Monitor, SpectralAlignmentMonitor
from lightning_collapse.spectral import PowerIteration
from lightning_collapse.utilities import weight_matrices
from tests.benchmarks import monitor_overhead
from tests.benchmarks.interleaved import ratios
from tests.benchmarks.models import Transformer

STEPS = 60
SHAPE, LARGER = (128, 16), ((64, 64), (64, 128))
READINGS: dict[str, Callable[[], Monitor]] = {
    "spectral alignment": lambda: SpectralAlignmentMonitor(every_n_steps=1),
    "gradient norms": lambda: GradientMonitor(noise=False, every_n_steps=1),
    "participation ratio": lambda: CollapseMonitor(measures=["participation_ratio"], every_n_steps=1),
}


def every_step(names: list[str], shape: tuple[int, int]) -> None:
    """Print (a) for batches of this many sequences of this many tokens."""
    found = ratios(
        Transformer,
        monitor_overhead.tokens(*shape),
        lambda: [READINGS[name]() for name in names],
        block=1,
        blocks=STEPS,
        logs=False,
    )
    print(f"{', '.join(names)} at every step, {shape[0]} x {shape[1]} tokens: {found}")


def power_step() -> None:
    """Print (b)."""
    weights = {matrix.name: matrix.read() for matrix in weight_matrices(Transformer())}
    power = PowerIteration()
    power.step(weights)
    shares, steps = [], []
    for _ in range(STEPS):
        times = [time.process_time()]
        power.step(weights)
        times.append(time.process_time())
        for weight in weights.values():
            torch.linalg.matrix_norm(weight, 2)
        times.append(time.process_time())
        step, exact = (end - start for start, end in pairwise(times))
        shares.append(step / exact)
        steps.append(1000 * step)
    print(f"one warm power step on {len(weights)} matrices takes {statistics.median(steps):.2f} ms")
    report("power step / matrix_norm(weight, 2)", shares)


def report(name: str, values: list[float]) -> None:
    """Print a ratio with its spread."""
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name}: median {median:.4f}, quartiles {low:.4f} and {high:.4f} ({len(values)} pairs)")


if __name__ == "__main__":
    torch.manual_seed(0)
    monitor_overhead.quiet()
    for reading in READINGS:
        every_step([reading], SHAPE)
    for shape in (SHAPE, *LARGER):
        every_step(list(READINGS), shape)
    power_step()
