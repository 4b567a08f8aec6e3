"""Channel whitening with random group partition."""

from collections.abc import Sequence

import numpy as np
import torch

from tests.losses.cases.base import Case, whitened
from tests.losses.cases.whitening import naive_distance


def naive_group_zca(z: np.ndarray, groups: Sequence[np.ndarray], axis: str, eps: float = 0.0) -> np.ndarray:
    """Whitened group by group of feature indices, each feature where it was."""
    z = z - z.mean(axis=1 if axis == "samples" else 0, keepdims=True)
    white = np.full_like(z, np.nan)
    for group in groups:
        x = z[:, group] if axis == "samples" else z[:, group].T  # what is made white, by what it is observed in
        covariance = (1 - eps) * x @ x.T / (x.shape[1] - 1) + eps * np.eye(len(x))
        values, vectors = np.linalg.eigh(covariance)
        x = vectors @ np.diag(values**-0.5) @ vectors.T @ x
        white[:, group] = x if axis == "samples" else x.T
    return white


def naive_channel_whitening(a: np.ndarray, b: np.ndarray) -> float:
    everything = [np.arange(a.shape[1])]
    return naive_distance(*(naive_group_zca(z, everything, "samples") for z in (a, b)))


CASES = {
    "CWRGP": Case(
        naive_channel_whitening,
        arguments={"sub_batch": 3, "groups": 1},  # fewer samples than features; groups are in a file of their own
        perfect=lambda views: [z.mT for z in whitened(views)],  # samples without a mean, orthogonal
        row=torch.tensor([1.0, 2.0, 3.0, 4.0]),  # equal samples that are not flat: a flat one has no direction
        shapes={"wide": (3, 10), "narrow": (3, 6), "pair": (2, 7)},
        rows=1,
        rtol=1e-10,
        wide=((16, 64), (64, 128)),
        split=((9, 12), (12, 24)),
        exact={"sub_batch": 5, "groups": 2, "iterations": 2, "scope": "global"},
        toy={"sub_batch": 6, "groups": 1},
        doors={"sub_batch": 3, "groups": 1},
    ),
}
