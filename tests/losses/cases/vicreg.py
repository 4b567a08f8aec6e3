"""VICReg and its two terms."""

import numpy as np

from tests.losses.cases.base import Case


def naive_variance(z: np.ndarray) -> float:
    return float(np.mean([max(0.0, 1.0 - np.sqrt(np.var(column, ddof=1) + 1e-4)) for column in z.T]))


def naive_covariance(z: np.ndarray) -> float:
    c = np.cov(z, rowvar=False)
    return sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j) / z.shape[1]


def naive_vicreg(a: np.ndarray, b: np.ndarray) -> float:
    variance = (naive_variance(a) + naive_variance(b)) / 2
    return 25 * np.mean((a - b) ** 2) + 25 * variance + naive_covariance(a) + naive_covariance(b)


CASES = {
    "CovarianceLoss": Case(naive_covariance, weight=None),
    "VICReg": Case(naive_vicreg),
    "VarianceLoss": Case(naive_variance, weight=None),
}
