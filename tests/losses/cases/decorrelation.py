"""The feature decorrelation of SimTPR."""

import numpy as np

from tests.losses.cases.base import Case


def naive_decorrelation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (np.stack([row / np.sqrt(row @ row) for row in z]) for z in (a, b))
    total = 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            correlation = np.corrcoef(a[:, i], b[:, j])[0, 1]
            total += (1 - correlation) ** 2 if i == j else 0.005 * correlation**2
    return float(total)


# `eps` is far below any variance, but not nothing; directions are those from the origin
CASES = {"FeatureDecorrelation": Case(naive_decorrelation, shift=False, rtol=1e-9, perfect_atol=1e-9)}
