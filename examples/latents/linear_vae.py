"""Which units of a linear VAE collapse, and which level of a hierarchical one? Training beside the closed forms.

Run: ``python examples/latents/linear_vae.py`` (a minute on one core; with ``--quick`` fewer steps).
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.functional import gaussian_divergence, latent_readings, latent_sums, linear_vae_divergence

EIGENVALUES = (2.18, 1.02, 0.371, 0.088)
"""Of the covariance of the data."""
NOISES = (0.05, 0.25, 0.5, 1.2, 2.5)
"""The weight of the divergence times the variance of the decoder."""
ROWS = 1024


class Level(NamedTuple):
    """A hierarchical VAE of one direction: signal, two fixed deviations, that of the inner prior, two weights."""

    theta: float
    sigma1: float
    eta: float
    prior: float
    beta1: float
    beta2: float


LEVELS = (
    Level(1.0, 0.2, 0.5, 0.9, 1.0, 1.0),
    Level(1.5, 0.3, 0.4, 0.3, 1.0, 0.5),
    Level(2.0, 0.2, 0.5, 0.5, 2.0, 1.0),
    Level(0.3, 0.8, 0.5, 0.4, 1.0, 1.0),
    Level(0.5, 0.1, 0.5, 0.6, 1.0, 2.0),
    Level(1.2, 0.4, 0.3, 0.5, 0.5, 1.5),
)


def minimize(loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int) -> None:
    """Adam, with a rate that falls to zero."""
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def rows_with(eigenvalues: Tensor) -> Tensor:
    """Rows whose covariance is exactly diagonal, with these eigenvalues."""
    rows = torch.randn(ROWS, len(eigenvalues), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(rows - rows.mean(dim=0)).Q
    scaled: Tensor = basis * (ROWS * eigenvalues).sqrt()
    return scaled


def linear_vae(noise: float, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergences of the units of a trained linear VAE, descending, and its readings."""
    data = rows_with(torch.tensor(EIGENVALUES, dtype=torch.float64))
    generator, width = torch.Generator().manual_seed(1), len(EIGENVALUES)
    encoder, decoder = (0.3 * torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2))
    log_variance = torch.zeros(width, dtype=torch.float64)
    parameters = [encoder.requires_grad_(), decoder.requires_grad_(), log_variance.requires_grad_()]
    covariance = data.T @ data / len(data)

    def loss() -> Tensor:  # the expectation over samples of the latent is exact
        rest = torch.eye(width, dtype=torch.float64) - decoder @ encoder
        error = (rest @ covariance * rest).sum() + (decoder.square() @ log_variance.exp()).sum()
        spread = (encoder @ covariance * encoder).sum(dim=1)
        total: Tensor = error / 2 + noise * (spread + log_variance.exp() - 1 - log_variance).sum() / 2
        return total

    minimize(loss, parameters, steps)
    mean = (data @ encoder.T).detach()
    rows = log_variance.detach().expand_as(mean)
    return gaussian_divergence(mean, rows).mean(dim=0).sort(descending=True).values, latent_readings(
        latent_sums(mean, rows)
    )


def predicted(level: Level) -> tuple[float, float]:
    """Weights of the encoder and of the inner prior at the optimum, and so which level is left."""
    line = level.beta2 / level.beta1 * level.prior**2
    alive = level.sigma1**2 * level.theta**2 / (level.beta2 * level.eta**2)
    if max(level.sigma1**2, alive) > line:
        spread = max(level.sigma1**2, alive)
        upper = spread - line
    else:
        spread = max(level.sigma1**2, level.theta * level.sigma1 * level.prior / (level.beta1**0.5 * level.eta))
        upper = 0.0
    return math.sqrt(spread - level.sigma1**2), math.sqrt(upper)


def hierarchical_vaes(levels: Sequence[Level], steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of encoder and inner prior, and the divergence of the top level, of all of them after training."""
    theta, sigma1, eta, prior, beta1, beta2 = torch.tensor(levels, dtype=torch.float64).unbind(dim=1)
    start = torch.full((4, len(levels)), 0.5, dtype=torch.float64)
    w1, decoder, u2, w2 = (row.clone().requires_grad_() for row in start)
    log_variance = torch.zeros(len(levels), dtype=torch.float64, requires_grad=True)

    def top() -> Tensor:
        spread = w1.square() + sigma1.square()
        divergence: Tensor = (w2.square() * spread + log_variance.exp() - 1 - log_variance) / 2
        return divergence

    def loss() -> Tensor:
        spread = w1.square() + sigma1.square()
        error = ((theta - decoder * w1).square() + (decoder * sigma1).square()) / (2 * eta.square())
        rest = spread * (1 - u2 * w2).square() + u2.square() * log_variance.exp()
        lower = (rest / prior.square() - 1 - (sigma1 / prior).square().log()) / 2
        total: Tensor = (error + beta1 * lower + beta2 * top()).sum()
        return total

    minimize(loss, [w1, decoder, u2, w2, log_variance], steps)
    return w1.detach().abs(), u2.detach().abs(), top().detach()


def main() -> None:
    """Train all, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps, to show that it runs")
    steps = 60 if parser.parse_args().quick else 6000
    eigenvalues, off = torch.tensor(EIGENVALUES, dtype=torch.float64), 0.0
    print("| weight x variance | divergences, trained | predicted | active units | predicted | information ceiling |")
    print("|---|---|---|---|---|---|")
    for noise in NOISES:
        trained, found = linear_vae(noise, steps)
        expected = linear_vae_divergence(eigenvalues / noise)
        off = max(off, float((trained - expected).abs().max()))
        active = int((1 - noise / eigenvalues > 0.01).sum())
        cells = [", ".join(f"{abs(value):.4f}" for value in values) for values in (trained.tolist(), expected.tolist())]
        ceiling = found["information_ceiling"].item()
        print(f"| {noise} | {cells[0]} | {cells[1]} | {int(found['active_units'])} | {active} | {ceiling:.4f} |")
    print("\n| signal, lower and decoder deviation, prior's, weights | encoder | predicted | inner prior | predicted |"
          " top divergence | left |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for level, w1, u2, kl in zip(LEVELS, *hierarchical_vaes(LEVELS, steps), strict=True):
        first, second = predicted(level)
        off = max(off, abs(w1 - first), abs(u2 - second))
        left = "both" if first and second else "lower" if first else "upper, of noise alone" if second else "none"
        setting = ", ".join(f"{value:g}" for value in level)
        print(f"| {setting} | {w1:.4f} | {first:.4f} | {u2:.4f} | {second:.4f} | {abs(kl):.4f} | {left} |")
    print(f"\nAfter {steps} steps nothing is further than {off:.1g} from its closed form.")


if __name__ == "__main__":
    main()
