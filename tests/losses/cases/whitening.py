"""Losses between whitened views."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case, Shape


def well_conditioned(shape: Shape, views: int) -> list[Tensor]:
    """Features of standard deviation about a half whose covariance may be inverted.

    Whitening multiplies the rounding of its input by the condition number, whoever computes it.
    """
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(shape[1]) + 0.5 * torch.randn(shape[1], shape[1], generator=generator) / shape[1] ** 0.5
    return [0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) @ mix.double() for _ in range(views)]


def naive_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of normalized rows."""
    a, b = (np.array([row / np.linalg.norm(row) for row in z]) for z in (a, b))
    return float(np.mean(np.sum((a - b) ** 2, axis=1)))


def naive_cholesky_whitening(z: np.ndarray, eps: float = 0.0) -> np.ndarray:
    covariance = (1 - eps) * np.cov(z, rowvar=False) + eps * np.eye(z.shape[1])
    inverse = np.linalg.inv(np.linalg.cholesky(covariance))
    return np.array([inverse @ (row - z.mean(axis=0)) for row in z])


def naive_wmse(a: np.ndarray, b: np.ndarray) -> float:
    return naive_distance(naive_cholesky_whitening(a), naive_cholesky_whitening(b))


CASES = {
    "WMSE": Case(
        naive_wmse,
        active=well_conditioned,
        shapes={"primal": (12, 5), "tall": (40, 6)},  # more rows than features
        rows=5,  # for the four features of the battery
        rtol=1e-10,
        wide=((256, 32),),
        split=((30, 7), (40, 6)),
        exact={"scope": "global"},
        messages=3,
    ),
}
