"""Feature drift of one layer: rows of a reference in a frame of their own, and how far other rows are from them."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from torch import Tensor

from lightning_collapse.functional import drift
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.features import evenly

DIRECTIONS, FREQUENCIES, TOP = 32, 128, 8
MOST_FOR_OVERLAP = 256
"""Width above which the decomposition is left out."""
MOST_FOR_PAIRS = 256
"""Rows that distances of all pairs are taken of."""


class Comparison(NamedTuple):
    """What :meth:`DriftReference.compare` returns.

    Attributes:
        readings: By curve, 0-dimensional; ``ks_largest`` and ``mmd2_deviation`` beside those that are drawn.
        projections: Of the rows, sorted, ``(k, n)``, for the next comparison.
    """

    readings: dict[str, Tensor]
    projections: Tensor


class DriftReference:
    """Rows that later ones of the same layer are compared with: all distances are in their deviations.

    Args:
        rows: Finite, ``(n, D)``, kept as they are.
        paired: Whether rows to compare are of the same inputs, so that no drift reads 0 and not noise.

    Attributes:
        constant: Whether the rows are all equal, so that there is nothing to compare with.
        overlaps: Whether they are of a width whose leading directions are compared.

    Example:
        >>> import torch
        >>> rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
        >>> found = DriftReference(rows, paired=True).compare(rows + 1.0).readings
        >>> round(found["cka"].item(), 3), round(found["overlap"].item(), 3), found["w1"].item() > 0.3
        (1.0, 1.0, True)
    """

    @full_precision
    def __init__(self, rows: Tensor, paired: bool = False) -> None:
        self.rows, self.paired = rows, paired
        width = rows.shape[1]
        self.overlaps = TOP < width <= MOST_FOR_OVERLAP
        self._mean = rows.mean(dim=0)
        self._scale = (rows - self._mean).square().mean().sqrt()
        self.constant = not bool(self._scale > 1e-6 * self._mean.abs().amax())  # at a point, where one may wait
        if self.constant:
            return
        x = (rows - self._mean) / self._scale
        directions = GaussianSketch(width, DIRECTIONS, rows.device).matrix
        self._directions = directions / (x @ directions).std(dim=0).clamp_min(1e-6)
        self._projections = self._project(x)
        kernel = drift.median_distance(evenly(x, MOST_FOR_PAIRS)).clamp_min(1e-6)
        self._frequencies = GaussianSketch(width, FREQUENCIES, rows.device).matrix * (sqrt(width) / kernel)
        features = drift.fourier_features(x, self._frequencies)
        self._sums = drift.fourier_sums(features)
        self._deviation = drift.mmd2_null_deviation(features, 1, 1) / 2
        self._top = drift.top_directions(x, TOP) if self.overlaps else None

    @full_precision
    def compare(self, rows: Tensor, previous: Tensor | None = None) -> Comparison:
        """How far rows are from those of the reference, and from the rows before.

        Args:
            rows: Finite, ``(m, D)``.
            previous: The projections of the rows before.
        """
        x = (rows - self._mean) / self._scale
        sums = drift.fourier_sums(drift.fourier_features(x, self._frequencies))
        projections = self._project(x)
        statistics = drift.kolmogorov_smirnov(self._projections, projections)
        found = {
            "mmd2": drift.mmd2_of_sums(self._sums, sums, unbiased=not self.paired),
            "mmd2_deviation": self._deviation * (1 / len(self.rows) + 1 / len(rows)),
            "w1": drift.wasserstein1(self._projections, projections).mean(),
            "ks": statistics.mean(),
            "ks_largest": statistics.amax(),
            "psi": drift.psi(self._projections, projections).mean(),
        }
        if self._top is not None:
            found["overlap"] = drift.subspace_overlap(self._top, drift.top_directions(x, TOP))
        if previous is not None:
            found["rate"] = drift.wasserstein1(previous, projections).mean()
        if self.paired and len(rows) == len(self.rows):
            found["cka"] = drift.debiased_cka(evenly(self.rows, MOST_FOR_PAIRS), evenly(rows, MOST_FOR_PAIRS))
        return Comparison(found, projections)

    def nulls(self, n: int, before: int) -> dict[str, float]:
        """What ``n`` rows read without drift, by curve; ``before`` is the number of rows of the comparison before."""
        overlap = {} if self._top is None else {"overlap": drift.overlap_null(TOP, self.rows.shape[1])}
        if self.paired:
            return dict.fromkeys(("mmd2", "w1", "ks", "psi", "rate", "cka"), 0.0) | overlap
        own = len(self.rows)
        return overlap | {
            "mmd2": 0.0,
            "w1": drift.wasserstein1_null(own, n),
            "ks": drift.ks_null(own, n),
            "psi": drift.psi_null(own, n),
            "rate": drift.wasserstein1_null(before, n) if before else 0.0,
        }

    def _project(self, x: Tensor) -> Tensor:
        found: Tensor = (x @ self._directions).mT.sort(dim=1).values
        return found
