"""CorInfoMax."""

import numpy as np

from tests.losses.cases.base import Case


def naive_determinant(z: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """One step of one view; the moments after it."""
    n, d = z.shape
    mean = 0.01 * mean + 0.99 * sum(z) / n
    covariance = 0.01 * covariance + 0.99 * sum(np.outer(row - mean, row - mean) for row in z) / n
    return -np.linalg.slogdet(covariance + 1e-6 * np.eye(d))[1] / d, mean, covariance


def naive_corinfomax(a: np.ndarray, b: np.ndarray) -> float:
    d = a.shape[1]
    determinants = [naive_determinant(z, np.zeros(d), np.eye(d))[0] for z in (a, b)]
    return float(sum(determinants) + 500 * np.mean((a - b) ** 2))


# at the published 500 for invariance one direction on which the views of the toy agree outgrows the others
CASES = {"CorInfoMax": Case(naive_corinfomax, settle=12, shift=False, weight=None)}
