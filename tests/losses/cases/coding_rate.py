"""Coding rate and MMCR."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case
from tests.losses.cases.sphere import unit


def naive_coding_rate(z: np.ndarray) -> float:
    n, d = z.shape
    second = sum(np.outer(x, x) for x in unit(z))
    return float(-0.5 * np.log(np.linalg.eigvalsh(np.eye(d) + d / (n * 0.2) * second)).sum())


def naive_mmcr(a: np.ndarray, b: np.ndarray) -> float:
    centroids = np.stack([unit(a), unit(b)]).mean(axis=0)
    return float(-np.linalg.norm(centroids, "nuc"))


def axes(views: int) -> list[Tensor]:
    """Every axis of five dimensions three times."""
    return [torch.eye(5, dtype=torch.float64).repeat(3, 1)] * views


CASES = {
    "CodingRate": Case(naive_coding_rate, perfect=axes, rows=1, shift=False, messages=1),
    "MMCR": Case(naive_mmcr, perfect=axes, rows=1, shift=False, messages=3),
}
