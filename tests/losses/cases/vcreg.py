"""VCReg."""

import numpy as np

from tests.losses.cases.base import Case


def naive_vcreg(z: np.ndarray, delta: float = np.inf) -> float:
    c, d = np.cov(z, rowvar=False), z.shape[1]
    variance = sum(max(0.0, 1 - np.sqrt(c[i, i] + 1e-5)) for i in range(d)) / d
    sizes = [abs(c[i, j]) for i in range(d) for j in range(d) if i != j]
    covariance = sum(x**2 if x <= delta else 2 * delta * x - delta**2 for x in sizes) / (d * (d - 1))
    return 0.16 * variance + 0.01 * covariance


CASES = {"VCReg": Case(naive_vcreg, weight=100.0)}
