"""SIGReg."""

import numpy as np
import torch
from torch import Tensor

from lightning_collapse.losses.support.directions import random_directions
from tests.losses.cases.base import Case


def naive_sigreg(z: np.ndarray) -> float:
    """All seventeen knots of Algorithm 1, complex exponentials, the trapezoid rule of numpy."""
    a = random_directions(z.shape[1], 1024, torch.tensor(0)).numpy()
    t = np.linspace(-5, 5, 17)
    values = []
    for direction in a.T:
        error = np.exp(1j * np.outer(z @ direction, t)).mean(axis=0) - np.exp(-(t**2) / 2)
        integrand = np.abs(error) ** 2 * np.exp(-(t**2) / 2)
        values.append(len(z) * np.sum((integrand[1:] + integrand[:-1]) / 2 * np.diff(t)))
    return float(np.mean(values))


def normal(views: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4096, 64, generator=generator, dtype=torch.float64)] * views


CASES = {
    "SIGReg": Case(
        naive_sigreg,
        perfect=normal,
        perfect_atol=0.3,
        row=torch.full((4,), 0.0),
        rows=1,
        shift=False,
        messages=1,
        weight=0.05,
        toy={"slices": 64},
    ),
}
