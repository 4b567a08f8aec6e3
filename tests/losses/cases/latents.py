"""Divergences of Gaussian posteriors, from means and log-variances side by side."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case, Shape

SHAPES = {"dual": (6, 10), "primal": (12, 4), "square": (8, 8)}
CORRELATION = 0.9


def halves(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances."""
    units = z.shape[1] // 2
    return z[:, :units], np.exp(z[:, units:])


def naive_free_bits(z: np.ndarray) -> float:
    mean, variance = halves(z)
    total = 0.0
    for unit in range(mean.shape[1]):
        m, v = mean[:, unit], variance[:, unit]
        total += max(0.25, np.mean([(a * a + b - 1 - math.log(b)) / 2 for a, b in zip(m, v, strict=True)]))
    return total


def naive_kl_balance(posterior: np.ndarray, prior: np.ndarray) -> float:
    (m, v), (n, w) = halves(posterior), halves(prior)
    return float(np.mean(np.sum(np.log(w / v) + (v + (m - n) ** 2) / w - 1, axis=1) / 2))


def naive_delta_vae(z: np.ndarray) -> float:
    """Of Gaussians in many dimensions, one with a Toeplitz covariance."""
    mean, variance = halves(z)
    steps = np.arange(mean.shape[1])
    covariance = CORRELATION ** np.abs(steps[:, None] - steps)
    precision, log_det = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]
    total = 0.0
    for m, v in zip(mean, variance, strict=True):
        trace = np.trace(precision @ np.diag(v))
        total += (trace + m @ precision @ m - len(m) + log_det - np.log(v).sum()) / 2
    return float(total / len(mean))


def posteriors(shape: Shape, views: int) -> list[Tensor]:
    """Narrower than their priors, and far enough from them that each group is above any floor."""
    generator = torch.Generator().manual_seed(0)
    rows, units = shape[0], shape[1] // 2
    found = []
    for view in range(views):
        mean = 0.9 * torch.randn(rows, units, generator=generator, dtype=torch.float64)
        spread = torch.rand(rows, units, generator=generator, dtype=torch.float64)
        found.append(torch.cat([mean, 0.2 * spread if view else -0.3 - 1.7 * spread], dim=1))
    return found


def at(row: list[float]) -> dict[str, Any]:
    """Facts of a loss whose least value is read where every posterior is this one, of two units."""
    exact = torch.tensor(row, dtype=torch.float64)
    return {
        "row": exact,
        "perfect": lambda views: [exact.expand(6, 4)] * views,
        "active": posteriors,
        "shapes": SHAPES,
        "rows": 1,
        "shift": False,
        "wide": (),
        "messages": 1,
        "weight": None,
    }


CASES = {
    "FreeBits": Case(naive_free_bits, **at([0.0] * 4), doors={"floor": 0.01}),
    "KLBalance": Case(naive_kl_balance, **at([0.0] * 4), detached=True, differentiable=False),
    "DeltaVAE": Case(naive_delta_vae, **at([0.0, 0.0, *[math.log(1 - CORRELATION**2)] * 2])),
}
