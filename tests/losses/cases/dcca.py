"""Deep canonical correlation analysis, by roots of covariances."""

import numpy as np

from tests.losses.cases.base import Case, whitened
from tests.losses.cases.whitening import well_conditioned

ANY = {"samples_per_feature": 0.0}


def inverse_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def naive_correlations(a: np.ndarray, b: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    own = [inverse_root(z.T @ z / (len(z) - 1) + ridge * np.eye(z.shape[1])) for z in (a, b)]
    return np.linalg.svd(own[0] @ (a.T @ b / (len(a) - 1)) @ own[1], compute_uv=False)


CASES = {
    "DCCA": Case(
        lambda a, b: -naive_correlations(a, b).sum(),
        arguments=ANY,
        active=well_conditioned,
        perfect=lambda views: [(15 / 16) ** 0.5 * z for z in whitened(views)],  # of unit variance
        rtol=1e-10,
        split=((60, 12), (40, 6)),  # more rows than features: of fewer all correlations are 1
        shapes={"dual": (6, 10), "primal": (12, 5)},
        exact=ANY,
        toy=ANY,
        doors=ANY,
    )
}
