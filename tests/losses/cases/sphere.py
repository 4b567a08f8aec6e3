"""Alignment and uniformity."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case


def unit(z: np.ndarray) -> np.ndarray:
    return np.array([row / np.sqrt((row**2).sum()) for row in z])


def naive_alignment(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.linalg.norm(x - y) ** 2 for x, y in zip(unit(a), unit(b), strict=True)]))


def naive_uniformity(z: np.ndarray) -> float:
    x = unit(z)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    return float(np.log(np.mean([np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i, j in pairs])))


def simplex(views: int) -> list[Tensor]:
    """Nine points at equal distances in eight dimensions."""
    corners = torch.eye(9, dtype=torch.float64) - 1 / 9
    basis = torch.linalg.qr(corners[:, :8])[0]
    return [corners @ basis] * views


CASES = {
    "Alignment": Case(naive_alignment, rows=1, shift=False, messages=1, weight=None),
    "Uniformity": Case(naive_uniformity, perfect=simplex, shift=False),
}
