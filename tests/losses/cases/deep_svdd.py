"""Deep support vector data description."""

import numpy as np
from torch import Tensor

from tests.losses.cases.base import Case, Shape, correlated, whitened


def naive_deep_svdd(z: np.ndarray) -> float:
    center = np.array([np.sign(c) * max(abs(c), 0.1) for c in z.mean(axis=0)])
    distance = np.mean([np.sum((row - center) ** 2) for row in z])
    return float(distance + sum(max(0.0, 1 - np.sqrt(np.var(column, ddof=1) + 1e-4)) for column in z.T))


def far_from_zero(shape: Shape, views: int) -> list[Tensor]:
    """With means that are the center as they are."""
    return [view + 3 for view in correlated(shape, views)]


CASES = {
    "DeepSVDD": Case(
        naive_deep_svdd,
        active=far_from_zero,
        # of variance s^2 with 15/16 s^2 - sqrt(s^2 + 1e-4) at its least
        perfect=lambda views: [(15 / 16 * ((8 / 15) ** 2 - 1e-4)) ** 0.5 * z + 3 for z in whitened(views)],
        shift=False,  # of means that are near zero
        messages=4,
        weight=None,
    )
}
