"""Losses on distances between rows."""

import numpy as np
import torch
from torch import Tensor

from tests.losses.cases.base import Case, whitened


def right_angles(views: int) -> list[Tensor]:
    return [torch.eye(16, dtype=torch.float64)] * views


def naive_koleo(z: np.ndarray) -> float:
    u = [row / np.sqrt(row @ row) for row in z]
    nearest = [min(np.sqrt((a - b) @ (a - b)) for j, b in enumerate(u) if j != i) for i, a in enumerate(u)]
    return -float(np.mean([np.log(distance + 1e-8) for distance in nearest]))


def naive_ldreg(z: np.ndarray, form: str = "paper") -> float:
    n, k = len(z), min(64, len(z) - 2)
    logs = []
    for i in range(n):
        distances = sorted(np.sqrt((z[i] - z[j]) @ (z[i] - z[j])) for j in range(n) if j != i)[:k]
        share = np.mean(distances[:-1]) / distances[-1]
        logs.append(np.log((share + 1e-4) / (1 - share + 1e-4)))
    return -float(np.mean(np.abs(logs) if form == "released" else logs))


def naive_tree_length(z: np.ndarray) -> float:
    """The algorithm of Prim."""
    joined, length = {0}, 0.0
    while len(joined) < len(z):
        distance, new = min(
            (np.sqrt((z[i] - z[j]) @ (z[i] - z[j])), j) for i in joined for j in range(len(z)) if j not in joined
        )
        length += distance
        joined.add(new)
    return length


def naive_tregs(a: np.ndarray, b: np.ndarray) -> float:
    n = len(a)
    total = 10 * sum((x - y) @ (x - y) for x, y in zip(a, b, strict=True)) / n
    for z in (a, b):
        total -= 0.2 * naive_tree_length(z) / n
        total += 8e-4 * sum((np.sqrt(x @ x) - 1) ** 2 for x in z) / n
    return float(total)


def simplex(views: int) -> list[Tensor]:
    """Sixteen rows on the unit sphere, as far from each other as can be."""
    return [view / 15**0.5 for view in whitened(views)]


# rows are gathered: no statistics are sent but one message of sums
CASES = {
    # looks at directions alone
    "KoLeo": Case(naive_koleo, perfect=right_angles, shift=False, messages=3),
    # what is equally far is equal to rounding, over `eps`; at a large mean rounding must not exchange neighbours
    "LDReg": Case(
        naive_ldreg,
        perfect=right_angles,
        rows=4,
        wide=((64, 128), (128, 32)),
        messages=3,
        differentiable=False,
        perfect_atol=1e-10,
    ),
    # the sphere has a center; the value at collapse is that of unit rows; and the published coefficients make views
    # that share one coordinate of 16 agree
    "TREGS": Case(
        naive_tregs,
        perfect=simplex,
        shift=False,
        messages=3,
        row=torch.full((4,), 0.5),
        weight=None,
    ),
}
