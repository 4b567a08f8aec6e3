"""Floors under the spectrum of one view."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case, Shape, correlated, whitened


def wave(shape: Shape) -> np.ndarray:
    """What is added to rows to tell them apart: a wave along each column, of a frequency of its own."""
    golden = (np.sqrt(5) - 1) / 2
    rows = np.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            rows[i, j] = np.sqrt(2) * np.cos(np.pi * i * ((j + 1) * golden % 1) + j + 1)
    return rows


def naive_jittered(z: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(z + 1e-5 * wave(z.shape), rowvar=False))


def naive_effective_rank_hinge(z: np.ndarray) -> float:
    n, d = z.shape
    eigenvalues = np.linalg.eigvalsh(naive_jittered(z))
    rank = eigenvalues.sum() ** 2 / ((eigenvalues**2).sum() + d * 1e-12)
    isotropic = d * (n - 1) / (d + n - 1)
    return max(0.0, 1 - rank / (0.5 * isotropic)) + max(0.0, 1 - np.sqrt(eigenvalues.mean()))


def naive_log_det_barrier(z: np.ndarray) -> float:
    a = (np.linalg.eigvalsh(naive_jittered(z)) + 1e-4) / (1 + 1e-4)
    return float(np.mean(a - 1 - np.log(a)))


def lopsided(shape: Shape, views: int) -> list[Tensor]:
    """Features that lie near a line, so that both hinges are at work."""
    scale = 0.5 ** torch.arange(shape[1], dtype=torch.float64)
    return [view * scale for view in correlated(shape, views)]


def white(views: int) -> list[Tensor]:
    """Rows whose covariance is the identity, once they have been jittered."""
    return [view * (15 / 16) ** 0.5 - 1e-5 * torch.from_numpy(wave((16, 15))) for view in whitened(views)]


CASES = {
    "EffectiveRankHinge": Case(naive_effective_rank_hinge, active=lopsided, messages=3),
    # where a direction has hardly any variance, its gradient at a large mean is that of the rounding
    "LogDetBarrier": Case(naive_log_det_barrier, perfect=white, wide=((256, 8), (512, 12)), messages=3),
}
