"""InfoNCE."""

import numpy as np

from tests.losses.cases.base import Case
from tests.losses.cases.sphere import simplex, unit


def naive_info_nce(a: np.ndarray, b: np.ndarray) -> float:
    rows, n = unit(np.concatenate([a, b])), len(a)
    values = []
    for i in range(2 * n):
        scores = {k: rows[i] @ rows[k] / 0.1 for k in range(2 * n) if k != i}
        values.append(np.log(sum(np.exp(s) for s in scores.values())) - scores[(i + n) % (2 * n)])
    return float(np.mean(values))


# compares all rows with all: there is no cheaper side
SHAPES = {"few": (6, 10), "many": (12, 5)}
CASES = {"InfoNCE": Case(naive_info_nce, perfect=simplex, shift=False, messages=3, shapes=SHAPES)}
