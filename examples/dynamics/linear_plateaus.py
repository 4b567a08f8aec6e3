"""What does a deep linear network learn first, when, and in how few directions?

Run: ``python examples/dynamics/linear_plateaus.py`` (20 seconds on one core; ``--quick``: a few steps).
"""

import argparse
from math import sqrt

import torch
from torch import Tensor

from lightning_collapse.functional.feature_learning import (
    mode_half_time,
    mode_strengths,
    outlying_singular_values,
)

STRENGTHS, DIM, START = (4.0, 2.0, 1.0, 0.5), 16, 1e-6


def orthogonal(seed: int, dim: int = DIM) -> Tensor:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return found


def descend(weights: list[Tensor], task: Tensor, rate: float) -> None:
    """A step on half the squared error, with whitened inputs; the first layer comes first."""
    product = [torch.eye(task.shape[1], dtype=task.dtype)]
    for weight in weights:
        product.append(weight @ product[-1])
    behind = task - product[-1]
    for i in reversed(range(len(weights))):
        gradient, behind = behind @ product[i].T, weights[i].T @ behind
        weights[i] = weights[i] + rate * gradient


def half_times(weights: list[Tensor], task: Tensor, steps: int, rate: float = 2e-3) -> list[float]:
    """When each mode has half of its strength; NaN if it never has."""
    found = [float("nan")] * len(STRENGTHS)
    for step in range(1, steps + 1):
        descend(weights, task, rate)
        if step % 5 == 0:
            learned, target = mode_strengths(weights[1] @ weights[0], task)
            for i, share in enumerate((learned / target)[: len(found)].tolist()):
                found[i] = step * rate if share >= 0.5 and found[i] != found[i] else found[i]
    return found


def main(steps: int = 7500, deep_steps: int = 1000, seeds: int = 3) -> None:
    """Train and print both tables."""
    left, right, modes = orthogonal(0), orthogonal(1), len(STRENGTHS)
    task = left[:, :modes] @ torch.tensor(STRENGTHS, dtype=torch.float64).diag() @ right[:, :modes].T
    aligned = half_times([sqrt(START) * right.T, sqrt(START) * left], task, steps)
    columns = [aligned]
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        gaussian = [1e-3 * torch.randn(DIM, DIM, generator=draw, dtype=torch.float64) for _ in range(2)]
        columns.append(half_times(gaussian, task, steps))
    print("| mode | formula | aligned weights |" + "".join(f" Gaussian, seed {seed} |" for seed in range(seeds)))
    print("|---" * (3 + seeds) + "|")
    for i, strength in enumerate(STRENGTHS):
        cells = [f"{strength:g}", f"{mode_half_time(strength, START):.2f}", *(f"{column[i]:.2f}" for column in columns)]
        print("| " + " | ".join(cells) + " |")
    print("\n| rank of the task | singular values off the bulk, by layer |\n|---|---|")
    for rank in (1, 3, 6):
        draw = torch.Generator().manual_seed(rank)
        a, b = (torch.randn(40, rank, generator=draw, dtype=torch.float64) for _ in range(2))
        weights = [0.1 * orthogonal(10 + i, 40) for i in range(4)]
        for _ in range(deep_steps):
            descend(weights, a @ b.T / 40, 0.1)
        counts = outlying_singular_values(torch.linalg.svdvals(torch.stack(weights))).tolist()
        print(f"| {rank} | {', '.join(map(str, counts))} of 40 |")
    print(f"\nAfter {steps} steps {sum(time == time for time in aligned)} of {modes} modes are half learned.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 steps: to see that it runs")
    main(*((20, 5, 1) if parser.parse_args().quick else ()))
