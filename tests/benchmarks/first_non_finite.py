"""What looking for the first NaN costs: at its defaults, in a step that is measured, and with ``replay=True``.

Fits beside a bare one, block by block, see ``tests.benchmarks.interleaved``: (a) blocks of 50 steps with one point, at
the defaults, on a transformer (goal 1.005) and on a small network, (b) steps that are all measured, (c) steps between
two points, with ``replay=False`` and ``True``. What a measured step costs is shared by the steps of its cadence.

Run: ``python -m tests.benchmarks.first_non_finite``.
"""

from collections.abc import Callable

from lightning.pytorch import LightningModule
from torch.utils.data import IterableDataset

from lightning_collapse import FirstNonFinite
from tests.benchmarks import monitor_overhead
from tests.benchmarks.interleaved import ratios
from tests.benchmarks.models import MLP, Transformer, digits

BLOCKS, STEPS, FAR = 4, 40, 10**6
MODELS: dict[str, tuple[Callable[[], LightningModule], Callable[[], IterableDataset[object]], int]] = {
    "transformer": (Transformer, monitor_overhead.tokens, 1),
    "digits MLP": (lambda: MLP(64), digits, 10),
}


def compare(title: str, monitor: Callable[[], FirstNonFinite], name: str, block: int, blocks: int) -> None:
    """Print one line."""
    model, data, times = MODELS[name]
    found = ratios(model, data(), lambda: [monitor()], block, blocks * times, logs=False)
    print(f"{title}, {name}: {found}", flush=True)


def main(block: int = 50) -> None:
    """Print all lines."""
    for name in MODELS:
        compare("at the defaults, a point in 50 steps", FirstNonFinite, name, block, BLOCKS)
        compare("every step measured", lambda: FirstNonFinite(every_n_steps=1), name, 1, STEPS)
        compare("between points", lambda: FirstNonFinite(every_n_steps=FAR), name, 4, STEPS // 4)
        compare("between points, replay", lambda: FirstNonFinite(True, FAR), name, 4, STEPS // 4)


if __name__ == "__main__":
    monitor_overhead.quiet()
    main()
