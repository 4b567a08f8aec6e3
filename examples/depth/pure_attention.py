"""Does attention alone lose rank with depth, and what keeps it? Random layers, without training.

Run: ``python examples/depth/pure_attention.py`` (seconds; with ``--quick`` one seed).
"""

import argparse
import statistics

import torch
from torch import Tensor

from lightning_collapse.functional import low_pass_gain, relative_spread

TOKENS, WIDTH, DEPTH = 32, 16, 5
WAYS = {"attention alone": False, "attention and skips": True}
SIZES = (1.0, 2.0)
"""Standard deviation of a weight, times the root of the width."""


@torch.no_grad()
def residuals(size: float, skips: bool, seed: int) -> list[tuple[float, float]]:
    """Of the tokens before each layer the share that is not their common mean, and the gain of the layer's map."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, found = drawn(TOKENS, WIDTH), []
    for _ in range(DEPTH):
        query, key, value = (tokens @ drawn(WIDTH, WIDTH) * size / WIDTH**0.5 for _ in range(3))
        weights = (query @ key.T / WIDTH**0.5).softmax(dim=-1)
        found.append((relative_spread(tokens).item(), low_pass_gain(weights).item()))
        tokens = weights @ value + (tokens if skips else 0)
    return found


def table(seeds: int) -> str:
    """Medians over seeds and ranges, in Markdown."""
    layers = " | ".join(f"before layer {i}" for i in range(DEPTH))
    lines = [f"| weights | layers | {layers} |", "|---" * (DEPTH + 2) + "|"]
    for size in SIZES:
        for name, skips in WAYS.items():
            runs = [residuals(size, skips, seed) for seed in range(seeds)]
            cells = [_said([run[layer][0] for run in runs]) for layer in range(DEPTH)]
            lines.append(f"| {size:g} | {name} | {' | '.join(cells)} |")
            cells = [_said([run[layer][1] for run in runs]) for layer in range(DEPTH)]
            lines.append(f"| | gain of its map | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(values: list[float]) -> str:
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def main(seeds: int = 3) -> None:
    """Print the table."""
    print(table(seeds))
    last = [statistics.median(residuals(1.0, skips, seed)[3][0] for seed in range(seeds)) for skips in WAYS.values()]
    print(f"\nAfter 3 steps of attention {last[0]:.1g} of the tokens was not their mean, with skips {last[1]:.2f}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed: to see that it runs")
    main(*((1,) if parser.parse_args().quick else ()))
