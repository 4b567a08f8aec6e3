"""VISReg."""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from lightning_collapse.losses.support.directions import random_directions
from tests.losses.cases.base import Case


def quantiles(n: int) -> np.ndarray:
    return np.array([NormalDist().inv_cdf(i / (n + 1)) for i in range(1, n + 1)])


def naive_visreg(z: np.ndarray, divisor: np.ndarray | None = None) -> float:
    """With a divisor of its own the standard deviation in the shape is a constant."""
    n, d = z.shape
    a = random_directions(d, 4096, torch.tensor(0)).numpy()
    mean, std = z.mean(axis=0), z.std(axis=0)
    normalized = (z - mean) / (std + 1e-4 if divisor is None else divisor)
    shape = np.mean([((np.sort(normalized @ direction) - quantiles(n)) ** 2).mean() for direction in a.T])
    return float(((1 - std) ** 2).mean() + shape + (mean**2).mean())


def normal(views: int) -> list[Tensor]:
    """One feature that is as normal as 4096 rows can be."""
    column = quantiles(4096)
    return [torch.from_numpy(column / column.std())[:, None]] * views


CASES = {
    "VISReg": Case(
        naive_visreg,
        perfect=normal,
        perfect_atol=1e-4,
        row=torch.full((4,), 0.0),
        exact={"scope": "global"},
        differentiable=False,  # see test_visreg.py for its gradient
        shift=False,
        messages=2,
        toy={"slices": 64},
    ),
}
