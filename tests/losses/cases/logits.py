"""Penalties of logits, one row at a time."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case


def naive_max_sup(z: np.ndarray) -> float:
    return 0.1 * sum(max(row) - sum(row) / len(row) for row in z) / len(z)


def naive_spectral_decoupling(z: np.ndarray) -> float:
    return 0.003 * sum(sum(logit**2 for logit in row) for row in z) / len(z)


def naive_group_entropy(z: np.ndarray) -> float:
    share = np.mean([np.exp(row / 0.1) / np.exp(row / 0.1).sum() for row in z], axis=0)
    groups = share[:3], share[3:]
    value = 2 * (sum(g.sum() * np.log(g.sum()) for g in groups) + np.log(2))
    for g in groups:
        value += sum(p / g.sum() * np.log(len(g) * p / g.sum()) for p in g)
    return float(value)


def half_new(views: int) -> list[Tensor]:
    """Three old classes and a new one that has as much as they together."""
    return [torch.tensor([[0.0, 0.0, 0.0, 0.1 * np.log(3)]], dtype=torch.float64).expand(6, 4)] * views


def zeros(views: int) -> list[Tensor]:
    return [torch.zeros(6, 4, dtype=torch.float64)] * views


CASES = {
    "GroupEntropy": Case(
        naive_group_entropy,
        {"old_classes": 3},
        perfect=half_new,
        rows=1,
        messages=1,
        weight=None,
    ),
    "MaxSup": Case(naive_max_sup, perfect=zeros, rows=1, messages=1, weight=None),
    "SpectralDecoupling": Case(
        naive_spectral_decoupling,
        perfect=zeros,
        row=torch.full((4,), 0.0),
        rows=1,
        shift=False,
        messages=1,
        weight=None,
    ),
}
