"""Barlow Twins."""

import numpy as np

from tests.losses.cases.base import Case, whitened


def naive_barlow_twins(a: np.ndarray, b: np.ndarray) -> float:
    a, b = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in (a, b))
    total = 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            correlation = float(np.mean(a[:, i] * b[:, j]))
            total += (1 - correlation) ** 2 if i == j else 0.0051 * correlation**2
    return total


CASES = {
    # far above `eps`, which is in the units of a variance
    "BarlowTwins": Case(naive_barlow_twins, perfect=lambda views: [1e3 * z for z in whitened(views)]),
}
