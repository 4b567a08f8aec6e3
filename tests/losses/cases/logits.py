"""Penalties of logits, one row at a time."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case


def naive_max_sup(z: np.ndarray) -> float:
    return 0.1 * sum(max(row) - sum(row) / len(row) for row in z) / len(z)


def naive_spectral_decoupling(z: np.ndarray) -> float:
    return 0.003 * sum(sum(logit**2 for logit in row) for row in z) / len(z)


def zeros(views: int) -> list[Tensor]:
    return [torch.zeros(6, 4, dtype=torch.float64)] * views


CASES = {
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
