"""Losses between whitened views."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case, Shape, whitened


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


def naive_iter_norm(rows: np.ndarray, iterations: int = 4) -> np.ndarray:
    """Of rows that are observations, by what the iteration does to each eigenvalue."""
    rows = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.atleast_2d(rows.T @ rows / (len(rows) - 1)))
    scales = []
    for share in values / values.sum():
        p = 1.0
        for _ in range(iterations):
            p = 1.5 * p - 0.5 * p**3 * share
        scales.append(p / np.sqrt(values.sum()))
    return rows @ vectors @ np.diag(scales) @ vectors.T


def naive_intl(a: np.ndarray, b: np.ndarray) -> float:
    a, b = naive_iter_norm(a.T), naive_iter_norm(b.T)  # samples are made white, features are the observations
    trace = sum((np.var(column, ddof=1) - 1) ** 2 for z in (a, b) for column in z.T)
    return naive_distance(a.T, b.T) + 0.01 * max(0.0, np.log2(a.shape[1]) - 3) * trace


def naive_zca(z: np.ndarray, power: float = 0.5) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
    return (z - z.mean(axis=0)) @ vectors @ np.diag(values**-power) @ vectors.T


def naive_spectral_transformation(a: np.ndarray, b: np.ndarray) -> float:
    return naive_distance(naive_zca(a), naive_zca(b))


CASES = {
    "INTL": Case(
        naive_intl,
        perfect=lambda views: [z.mT for z in whitened(views)],  # samples without a mean, orthogonal
        row=torch.arange(1.0, 5.0),  # equal samples that are not flat: a flat one has no direction
        shapes={"dual": (12, 20), "primal": (12, 5), "small": (6, 10)},
        rtol=1e-10,
    ),
    "SpectralTransformation": Case(
        naive_spectral_transformation,
        active=well_conditioned,
        shapes={"primal": (12, 5), "tall": (40, 6)},  # more rows than features
        rtol=1e-10,
        wide=((256, 32),),
        split=((40, 6),),  # a gradient of the layer's weight that is not all cancellation in single precision
        messages=3,
    ),
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
        doors={"sub_batch": 16},  # two of them, so that the shuffle counts
    ),
}
